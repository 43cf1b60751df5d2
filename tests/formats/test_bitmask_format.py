"""One bit a weight and the kept ones: back to the bit, and nothing that contradicts itself is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compresskit.errors import FormatError
from compresskit.formats import FORMATS
from compresskit.formats.bitmask import Bitmask, PackedLayer, layer_of, layers_of
from compresskit.formats.grid import Grid, same_grid
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse(rows: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, inputs, generator=generator) < 0.4
    return (torch.randn(rows, inputs, generator=generator) * keep).to(dtype).abs() + 0.0


def two_of_four(rows: int, inputs: int) -> Tensor:
    weight = sparse(rows, inputs, torch.float32) + 1
    weight.view(rows, -1, 4)[..., 1::2] = 0
    return weight


def model(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    """Odd shapes, a bias, a layer of GPT-2's kind, integers per row and per group, and a layer of zeros."""
    rows, groups = sparse(6, 64, dtype, 1), sparse(5, 64, dtype, 2)
    grids = {"rows": grid_for(rows, parse("w8a16")), "groups": grid_for(groups, parse("w8a16-g32"))}
    return {
        "plain.weight": sparse(5, 13, dtype),
        "plain.bias": torch.ones(5, dtype=dtype),
        "turned.weight": sparse(7, 20, dtype).t().contiguous(),
        "rows.weight": grids["rows"].snap(rows),
        "groups.weight": grids["groups"].snap(groups),
        "nothing.weight": torch.zeros(3, 9, dtype=dtype),
        "pairs.weight": two_of_four(4, 16).to(dtype),
        "norm.weight": torch.ones(4, dtype=dtype),
    }, grids


def packed(tensors: dict[str, Tensor], grids: dict[str, Grid]) -> tuple[Bitmask, dict[str, Tensor], Any]:
    layers = {}
    for name in ("plain", "turned", "rows", "groups", "nothing", "pairs"):
        weight = tensors[f"{name}.weight"].t() if name == "turned" else tensors[f"{name}.weight"]
        pattern = "2:4" if name == "pairs" else ""
        layers[name] = layer_of(weight, grids.get(name), pattern=pattern, transposed=name == "turned")
    form = Bitmask(layers)
    config = json.loads(json.dumps(form.config(grids, ["head"])))
    return form, dict(form.encode(tensors.items(), grids)), config


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_the_inverse(dtype: torch.dtype) -> None:
    tensors, grids = model(dtype)
    form, stored, config = packed(tensors, grids)
    assert layers_of(config) == form.layers
    for order in (list(stored.items()), list(reversed(stored.items()))):
        back = {d.name: d for d in FORMATS["compresskit-bitmask"]().decode(iter(order), config)}
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(back[name].tensor, tensor), name
            assert back[name].tensor.dtype == dtype
            assert back[name].tensor.is_contiguous()
            assert same_grid(back[name].grid, grids.get(name.removesuffix(".weight"))), name


def test_what_is_stored_is_what_the_docstring_says() -> None:
    tensors, grids = model()
    form, stored, _ = packed(tensors, grids)
    weight, mask = tensors["plain.weight"], stored["plain.mask"]
    kept = [(o, i) for o in range(5) for i in range(13) if weight[o, i]]
    assert stored["plain.values"].tolist() == [weight[o, i] for o, i in kept]
    assert kept == [(o, i) for o in range(5) for i in range(16) if int(mask[o, i // 8]) >> i % 8 & 1]
    assert stored["turned.weight"].tolist() == [7, 20]
    q = grids["groups"].quantize(tensors["groups.weight"])
    assert stored["groups.values"].tolist() == [int(v) for v in q.flatten() if v]
    assert torch.equal(stored["groups.scales"], grids["groups"].scale_OG)
    for name, layer in form.layers.items():
        parts = {k: t for k, t in stored.items() if k.rpartition(".")[0] == name and not k.endswith("bias")}
        assert {k.rpartition(".")[2]: (t.dtype, tuple(t.shape)) for k, t in parts.items()} == layer.parts
        assert sum(t.numel() * t.element_size() for t in parts.values()) == layer.bytes
        assert layer.dense_bytes == tensors[f"{name}.weight"].numel() * 4
    assert form.layers["nothing"].zero_fraction == 1


Harm = Callable[[dict[str, Tensor]], object]


def changed(name: str, make: Callable[[Tensor], Tensor]) -> Harm:
    return lambda stored: stored.update({name: make(stored[name])})


def flipped(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[0, 0] ^= 1
    return mask


def moved(mask: Tensor) -> Tensor:
    """As many bits as before; one of them in the group of three others."""
    mask = mask.clone()
    mask[0, 0], mask[0, 1] = 0b01010111, 0b01010100
    return mask


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda s: s.pop("plain.values"), "plain: expected every tensor of a packed layer, got no values"),
        (lambda s: s.pop("rows.scales"), "rows: expected every tensor of a packed layer, got no scales"),
        (changed("plain.mask", flipped), "plain: expected a value for each of"),
        (changed("plain.values", lambda t: t[:-1]), r"plain values: expected float32 of \(\d+,\) as config"),
        (changed("plain.values", Tensor.double), "plain values: expected float32 of .*got float64"),
        (changed("plain.values", lambda t: t * torch.nan), "plain values: expected finite numbers"),
        (changed("plain.mask", lambda t: t[:, :1]), r"plain mask: expected uint8 of \(5, 2\)"),
        (changed("plain.mask", Tensor.int), "plain mask: expected uint8"),
        (changed("plain.mask", lambda t: t | 128), "plain: expected"),
        (changed("plain.weight", lambda t: t + 1), r"plain weight: expected \[5, 13\], got \[6, 14\]"),
        (changed("groups.scales", lambda t: t[:, :1]), r"groups scales: expected float32 of \(5, 2\)"),
        (changed("groups.scales", lambda t: t / 0), "groups scales: expected finite numbers"),
        (changed("rows.values", Tensor.float), "rows values: expected int8"),
        (changed("pairs.mask", moved), r"at most 2 of every 4 inputs kept \(2:4\), got 3 in row 0, group 0"),
        (lambda s: s.update({"plain.scales": torch.ones(5, 1)}), "plain scales: expected none"),
    ],
)
def test_files_that_contradict_themselves_are_refused(harm: Harm, told: str) -> None:
    tensors, grids = model()
    form, stored, config = packed(tensors, grids)
    harm(stored)
    order = sorted(stored.items(), key=lambda item: not item[0].endswith("scales"))
    with pytest.raises(FormatError, match=told):
        list(form.decode(iter(order), config))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"version": 2}, "version 1, got compresskit-bitmask, version 2. Read it with the compresskit that"),
        ({"quant_method": "gptq"}, "got gptq, version 1"),
        ({"ignore": "head"}, "ignore: expected a list of names, got 'head'"),
        ({"ignore": 3}, "ignore: expected a list of names, got 3"),
        ({"layers": []}, "expected a mapping, got list"),
        ({"layers": {"a": 3}}, "layers.a: expected a mapping, got 3"),
        ({"layers": {"a": {"shape": [1, 2]}}}, "layers.a: expected kept, dtype, got none"),
        ({"shape": [5]}, "shape: expected outputs and inputs"),
        ({"shape": [5, 0]}, "shape: expected two sizes above 0"),
        ({"shape": "5x13"}, "shape: expected a value of its kind, got '5x13'"),
        ({"kept": 66}, "kept: expected 0 to 65, got 66"),
        ({"kept": -1}, "kept: expected 0 to 65, got -1"),
        ({"dtype": "float64"}, "dtype: expected float32, bfloat16, float16, got 'float64'"),
        ({"bits": 16}, "bits: expected 2 to 8"),
        ({"group_size": 5}, "group_size: expected a divisor of 13, with bits"),
        ({"pattern": "4:2"}, "pattern: expected N:M"),
        ({"colour": "red"}, "colour: expected a known field"),
    ],
)
def test_configurations_that_cannot_be_are_refused(said: dict[str, Any], told: str) -> None:
    config = Bitmask({"plain": PackedLayer(shape=(5, 13), kept=20, dtype="float32")}).config({}, [])
    config = json.loads(json.dumps(config))
    outer = said.keys() & {"version", "quant_method", "layers", "ignore"}
    (config if outer else config["layers"]["plain"]).update(said)
    with pytest.raises(FormatError, match=told):
        layers_of(config)


def test_a_weight_that_is_not_what_was_announced_is_refused() -> None:
    tensors, grids = model()
    layers = {"plain": layer_of(tensors["plain.weight"])}
    cases = [
        (replace(layers["plain"], kept=3), {}, "plain values"),
        (replace(layers["plain"], pattern="1:13"), {}, "at most 1 of every 13 inputs"),
        (replace(layers["plain"], shape=(13, 5)), {}, "plain mask"),
    ]
    for layer, given, told in cases:
        with pytest.raises(FormatError, match=told):
            list(Bitmask({"plain": layer}).encode(tensors.items(), given))
    off = {"rows.weight": tensors["rows.weight"] * 1.001}
    with pytest.raises(FormatError, match="a weight that lies on its grid"):
        list(Bitmask({"rows": layer_of(tensors["rows.weight"], grids["rows"])}).encode(off.items(), grids))
    with pytest.raises(FormatError, match="none for"):
        list(Bitmask({"lost": layers["plain"]}).encode(tensors.items(), {}))


def test_a_zero_has_no_sign() -> None:
    weight = torch.tensor([[-0.0, 1.0, 0.0, -2.0]])
    form = Bitmask({"a": layer_of(weight)})
    assert form.layers["a"].kept == 2
    (back,) = form.decode(form.encode([("a.weight", weight)], {}), form.config({}, []))
    assert back.tensor.tolist() == [[0.0, 1.0, 0.0, -2.0]]
