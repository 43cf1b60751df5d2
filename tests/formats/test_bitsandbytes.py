"""Packing NF4 against bitsandbytes' own, the way back, and what it makes of what we wrote."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from compresskit.errors import FormatError
from compresskit.formats import FORMATS
from compresskit.formats.bitsandbytes import STATE, Bitsandbytes
from compresskit.formats.grid import Grid, same_grid
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantised(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    torch.manual_seed(0)
    weight = torch.randn(6, 128).to(dtype)
    weight[0, :64] = 0
    grid = grid_for(weight, parse("nf4"))
    tensors = {"a.weight": grid.snap(weight), "a.bias": torch.ones(6), "norm.weight": torch.ones(4)}
    return tensors, {"a": grid}


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_the_inverse(dtype: torch.dtype) -> None:
    tensors, grids = quantised(dtype)
    form = FORMATS["bitsandbytes"]()
    config = json.loads(json.dumps(form.config(grids, ["lm_head"])))
    stored = dict(form.encode(tensors.items(), grids))
    assert stored["a.weight"].numel() == 6 * 128 // 2
    for order in (list(stored.items()), list(reversed(stored.items()))):
        back = {d.name: d for d in form.decode(iter(order), config)}
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(back[name].tensor, tensor)
            assert back[name].tensor.dtype == tensor.dtype
        assert same_grid(back["a.weight"].grid, grids["a"])
        assert back["a.bias"].grid is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_the_values_that_we_mean(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors, grids = quantised(dtype)
    stored = dict(Bitsandbytes().encode(tensors.items(), grids))
    stats = {k.removeprefix("a.weight."): t for k, t in stored.items() if k.startswith("a.weight.")}
    state = functional.QuantState.from_dict(stats, torch.device("cpu"))
    values = functional.dequantize_4bit(stored["a.weight"], state)
    assert values.dtype == dtype
    # Its kernels multiply in float32 as well, but round to half precision their own way: one step at most.
    step = torch.finfo(dtype).eps * values.abs() if dtype != torch.float32 else torch.zeros_like(values)
    assert bool(((values - tensors["a.weight"]).abs() <= step).all())
    assert bool((values[0, :64] == 0).all())


@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_writes_is_read(nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    weight = torch.randn(64, 512)
    packed, state = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=nested
    )
    stored = {"a.weight": packed} | {f"a.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    (found,) = Bitsandbytes().decode(stored.items(), Bitsandbytes().config({}, []))
    assert torch.allclose(found.tensor, functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)
    assert found.grid is not None


def test_what_does_not_fit_is_refused() -> None:
    tensors, grids = quantised()
    form = Bitsandbytes()
    stored = dict(form.encode(tensors.items(), grids))
    config = form.config(grids, [])
    with pytest.raises(FormatError, match="got 'bitsandbytes', fp4"):
        list(form.decode(stored.items(), config | {"bnb_4bit_quant_type": "fp4"}))
    del stored[f"a.weight.{STATE}"]
    with pytest.raises(FormatError, match=f"a: expected every part of a packed weight, got no {STATE}"):
        list(form.decode(stored.items(), config))
    with pytest.raises(FormatError, match=r"none for \['b'\]"):
        dict(form.encode(tensors.items(), {**grids, "b": grids["a"]}))
    tensors["a.weight"][1, 2] += 1e-4
    with pytest.raises(FormatError, match="a: expected a weight that lies on its grid, got 1 of 768"):
        dict(form.encode(tensors.items(), grids))
    other = {"a": grid_for(tensors["a.weight"], parse("w4a16-g64"))}
    with pytest.raises(FormatError, match="a: expected nf4 in groups of 64, got int"):
        dict(form.encode(tensors.items(), other))
