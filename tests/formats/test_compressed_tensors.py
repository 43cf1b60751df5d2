"""Packing against compressed-tensors' own, the way back, and the real reader in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor

from compresskit.errors import FormatError
from compresskit.formats import FORMATS, export
from compresskit.formats.checkpoint import export_checkpoint, write_shards
from compresskit.formats.compressed_tensors import CompressedTensors, pack, unpack
from compresskit.formats.grid import Grid, same_grid, write_grids
from compresskit.modeling import ModelSource, copy_sidecars, load_model, open_model
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse
from tests.formats.rounding import round_inputs

LOGIT_TOLERANCE = 1e-5


@pytest.mark.parametrize("shape", [(3, 64), (5, 13), (1, 8)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_theirs(bits: int, shape: tuple[int, int]) -> None:
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = pack(q, bits)
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(unpack(packed, bits, shape[1]), q)


def quantised(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    torch.manual_seed(0)
    weight = torch.randn(6, 64).to(dtype)
    grid = grid_for(weight, parse(scheme))
    if parse(scheme).static:
        grid = replace(grid, activation_scale=torch.ones(1, dtype=dtype))
    return {"a.weight": grid.snap(weight), "a.bias": torch.ones(6), "norm.weight": torch.ones(4)}, {"a": grid}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scheme",
    ["w8a8", "w8a16", "w4a16-g32", "w4a16-channel", "w4a16-g32-asym", "w4a8-g32", "w8a8-static", "fp8"],
)
@pytest.mark.parametrize("name", ["compressed-tensors"])
def test_decode_is_the_inverse(name: str, scheme: str, dtype: torch.dtype) -> None:
    tensors, grids = quantised(scheme, dtype)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    form = FORMATS[name]()
    config = json.loads(json.dumps(form.config(grids, ["lm_head"])))
    stored = dict(form.encode(tensors.items(), grids))
    for order in (list(stored.items()), list(reversed(stored.items()))):
        back = {d.name: d for d in form.decode(iter(order), config)}
        assert {key: d.tensor.dtype for key, d in back.items()} == {k: t.dtype for k, t in tensors.items()}
        assert all(torch.equal(back[key].tensor, tensor) for key, tensor in tensors.items())
        assert same_grid(back["a.weight"].grid, grids["a"])
        assert back["a.bias"].grid is None
    assert all(torch.equal(tensors[key], before[key]) for key in before)


def test_tensors_are_read_one_at_a_time() -> None:
    tensors, grids = quantised("w8a8")
    taken: list[str] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            taken.append(name)
            yield name, tensor

    next(CompressedTensors().encode(source(), grids))
    assert taken == ["a.weight"]


def test_a_weight_off_its_grid_is_refused() -> None:
    tensors, grids = quantised("w4a16-g32")
    tensors["a.weight"][1, 2] += 1e-4
    with pytest.raises(FormatError, match="a: expected a weight that lies on its grid, got 1 of 384"):
        dict(CompressedTensors().encode(tensors.items(), grids))


def test_a_grid_without_a_weight_is_refused() -> None:
    tensors, grids = quantised("w8a8")
    with pytest.raises(FormatError, match=r"none for \['b'\]"):
        dict(CompressedTensors().encode(tensors.items(), {**grids, "b": grids["a"]}))


def test_decode_says_what_is_missing_or_foreign() -> None:
    tensors, grids = quantised("w4a16-g32")
    form = CompressedTensors()
    config = form.config(grids, [])
    stored = dict(form.encode(tensors.items(), grids))
    del stored["a.weight_shape"]
    with pytest.raises(FormatError, match="a: expected every part of a packed weight, got no weight_shape"):
        list(form.decode(stored.items(), config))
    with pytest.raises(FormatError, match="got 'gptq'"):
        list(form.decode(stored.items(), {"quant_method": "gptq"}))


def test_what_the_format_cannot_hold_is_refused() -> None:
    form, zeros, plain = CompressedTensors(), quantised("w4a16-g32-asym")[1]["a"], quantised("w8a16")[1]["a"]
    with pytest.raises(FormatError, match="one scheme for all layers where any has zero points, got 2"):
        form.config({"a": zeros, "b": plain}, [])
    with pytest.raises(FormatError, match="integer or e4m3 grids, got nf4 in b"):
        form.config({"a": plain, "b": quantised("nf4")[1]["a"]}, [])


def checkpoint(source: ModelSource, out: Path, schemes: dict[str, str]) -> dict[str, Grid]:
    """``source`` with layers whose names end as ``schemes`` says on their grids."""
    tensors = {name: source.tensor(name) for name in source.names()}
    grids = {}
    for layer, linear in source.anatomy.linears.items():
        scheme = next((s for tail, s in schemes.items() if layer.endswith(tail)), None)
        if scheme and not linear.tied and not parse(scheme).misfit(linear.in_features):
            weight = tensors[f"{layer}.weight"]
            grids[layer] = grid_for(weight, parse(scheme))
            if parse(scheme).static:
                grids[layer] = replace(grids[layer], activation_scale=torch.tensor([0.02]).to(weight))
            tensors[f"{layer}.weight"] = grids[layer].snap(weight)
    out.mkdir()
    write_shards(out, tensors.items())
    write_grids(out, grids)
    copy_sidecars(source.directory, out)
    return grids


READER = """
import sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.save(model(torch.arange(1, 61).view(2, -1)).logits, directory + ".pt")
"""


def as_users_see_them(directories: list[Path]) -> list[Tensor]:
    """Logits of plain ``from_pretrained`` in a process that never heard of compresskit."""
    command = [sys.executable, "-c", READER, *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{directory}.pt") for directory in directories]


def as_we_mean_it(directory: Path, grids: dict[str, Grid]) -> Tensor:
    model = load_model(directory)
    for layer, grid in grids.items():
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, grid=grid: (round_inputs(args[0], grid),)
        )
    with torch.no_grad():
        logits: Tensor = model(torch.arange(1, 61).view(2, -1)).logits
    return logits


SCHEMES = (
    {"proj": "w8a8"},
    {"proj": "w8a16"},
    {"proj": "w4a16-g32"},
    {"proj": "w4a16-g64"},
    {"proj": "w4a16-g128"},
    {"self_attn.q_proj": "w4a16-g32", "down_proj": "w8a8", "up_proj": "w8a16"},
    {"proj": "w4a16-g32-asym"},
    {"proj": "w4a8-g32"},
    {"proj": "w8a8-static"},
    {"proj": "fp8"},
    {"q_proj": "fp8", "v_proj": "w8a8-static", "down_proj": "w4a8-channel", "up_proj": "w4a16-channel"},
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_plain_from_pretrained_computes_what_we_mean(name: str, shared_data: Path, tmp_path: Path) -> None:
    source = open_model(shared_data / "models" / name)
    with torch.no_grad():
        dense = load_model(source)(torch.arange(1, 61).view(2, -1)).logits
    outs, wants = [], []
    for index, schemes in enumerate(SCHEMES):
        middle, out = tmp_path / f"{index}-dense", tmp_path / f"{index}-out"
        grids = checkpoint(source, middle, schemes)
        out.mkdir()
        if grids:  # no group of 128 fits stories260K
            export(open_model(middle), out)
            outs.append(out)
            wants.append(as_we_mean_it(middle, grids))
    assert len(outs) == len(SCHEMES) - (name == "stories260K")
    for out, got, want in zip(outs, as_users_see_them(outs), wants, strict=True):
        assert (got - want).abs().max() <= LOGIT_TOLERANCE, out
        assert (got - dense).abs().max() > 100 * LOGIT_TOLERANCE, f"{out}: not quantised at all"


@pytest.mark.slow
def test_half_precision_models_too(tmp_path: Path) -> None:
    outs, wants = [], []
    for dtype in (torch.bfloat16, torch.float16):
        place = tmp_path / str(dtype)
        source = open_model(tiny_llama(place / "model", dtype=dtype, tie_word_embeddings=False))
        grids = checkpoint(source, place / "dense", {"proj": "w8a8", "lm_head": "w8a8"})
        assert "lm_head" in grids
        outs.append(place / "out")
        outs[-1].mkdir()
        export(open_model(place / "dense"), outs[-1])
        wants.append(as_we_mean_it(place / "dense", grids))
    for got, want in zip(as_users_see_them(outs), wants, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_export_is_smaller_deterministic_and_sharded(tmp_path: Path) -> None:
    source = open_model(tiny_llama(tmp_path / "model"))
    grids = checkpoint(source, tmp_path / "dense", {"proj": "w4a16-g32"})
    dense = open_model(tmp_path / "dense")
    for name in ("one", "two", "many"):
        (tmp_path / name).mkdir()
    export(dense, tmp_path / "one")
    export(dense, tmp_path / "two")
    export_checkpoint(dense, tmp_path / "many", shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "grids.safetensors" not in files
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    shards = {n: load_file(tmp_path / "many" / n) for n in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(shards[n][key], whole[key]) for key, n in index["weight_map"].items())
    # Decoding what is on disk gives the dense checkpoint back to the bit.
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    back = {d.name: d.tensor for d in CompressedTensors().decode(whole.items(), config)}
    assert back.keys() == set(dense.names())
    assert all(torch.equal(back[name], dense.tensor(name)) for name in dense.names())
    packed = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert packed < 0.6 * (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert len(grids) == 14


def test_a_model_without_grids_is_copied(tmp_path: Path) -> None:
    source = open_model(tiny_llama(tmp_path / "model"))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "out").mkdir()
    export(source, tmp_path / "out")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
