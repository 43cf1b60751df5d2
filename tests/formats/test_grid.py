"""Grids: every value comes back to the bit, zeros stay zero, files are exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from compresskit.errors import FormatError
from compresskit.formats.grid import GRIDS_FILE, Grid, read_grids, same_grid, write_grids
from tests.formats.rounding import round_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid_of(bits: int, dtype: torch.dtype, group_size: int | None = None, rows: int = 64) -> Grid:
    torch.manual_seed(bits)
    groups = 1 if group_size is None else 256 // group_size
    scale = (torch.rand(rows, groups) * 0.01 + 1e-3).to(dtype)
    return Grid(bits=bits, scale_OG=scale, group_size=group_size)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_integer_is_recovered(bits: int, dtype: torch.dtype, group_size: int | None) -> None:
    grid, half = grid_of(bits, dtype, group_size), 2 ** (bits - 1)
    q = (torch.arange(64 * 256) % (2 * half) - half).to(torch.int8).view(64, 256)
    weight = grid.dequantize(q)
    assert weight.dtype == dtype
    assert torch.equal(grid.quantize(weight), q)
    assert torch.equal(grid.snap(weight), weight)


def test_snap_is_the_slow_loop() -> None:
    grid = Grid(bits=4, scale_OG=torch.tensor([[0.5, 2.0]]), group_size=2)
    weight = torch.tensor([[0.3, -9.0, 3.1, 0.0]])
    want = []
    for i, w in enumerate(weight[0].tolist()):
        scale = [0.5, 2.0][i // 2]
        want.append(min((abs(q * scale - w), q * scale) for q in range(-8, 8))[1])
    assert grid.snap(weight).tolist() == [want]
    assert weight.tolist() == torch.tensor([[0.3, -9.0, 3.1, 0.0]]).tolist(), "not modified"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_above_and_below_a_zero_point_is_recovered(dtype: torch.dtype) -> None:
    zero = torch.randint(-8, 8, (64, 8), dtype=torch.int8)
    grid = replace(grid_of(4, dtype, 32), zero_point_OG=zero)
    q = torch.randint(-8, 8, (64, 256), dtype=torch.int8)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    assert torch.equal(grid.quantize(grid.dequantize(q)), q)
    assert torch.equal(grid.dequantize(q), dequantize(q, grid.scale_OG, zero, args=args))
    assert not grid.snap(torch.zeros(64, 256, dtype=dtype)).any(), "zero is on every grid"


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_is_that_of_compressed_tensors(dtype: torch.dtype) -> None:
    grid = replace(grid_of(8, dtype), number="float")
    weight = (torch.randn(64, 256) * grid.scale_OG.float() * 150).to(dtype)
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    want = fake_quantize(weight, grid.scale_OG, torch.zeros_like(grid.scale_OG), args)
    # It divides in the weight's dtype, which decides some ties otherwise: a step is an eighth at most.
    torch.testing.assert_close(grid.snap(weight), want, rtol=0.13, atol=0)
    assert (grid.snap(weight) == want).float().mean() > 0.97
    assert torch.equal(grid.snap(grid.snap(weight)), grid.snap(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(64, 256).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    grid = Grid(bits=4, scale_OG=weight.view(64, 4, 64).abs().amax(-1), group_size=64, number="nf4")
    assert torch.equal(grid.scale_OG.float().flatten(), state.absmax)
    want = functional.dequantize_4bit(packed, state)
    assert (grid.snap(weight) == want).float().mean() > 0.999, "all but ties"
    assert torch.equal(grid.snap(grid.snap(weight)), grid.snap(weight))


def test_columns_are_a_part_of_the_grid() -> None:
    torch.manual_seed(0)
    zero = torch.randint(-8, 8, (64, 8), dtype=torch.int8)
    grid, weight = replace(grid_of(4, torch.bfloat16, 32), zero_point_OG=zero), torch.randn(64, 256) / 50
    for start, stop in ((0, 32), (7, 8), (64, 128)):
        part = grid.columns(start, stop)
        assert torch.equal(part.snap(weight[:, start:stop]), grid.snap(weight)[:, start:stop])
    rows = grid_of(4, torch.bfloat16)
    assert torch.equal(rows.columns(5, 9).snap(weight[:, 5:9]), rows.snap(weight)[:, 5:9])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_compressed_tensors(dtype: torch.dtype) -> None:
    grid = grid_of(4, dtype, 32)
    q = torch.randint(-8, 8, (64, 256), dtype=torch.int8)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    assert torch.equal(grid.dequantize(q), dequantize(q, grid.scale_OG, args=args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_as_compressed_tensors_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 16) * 3).to(dtype)
    x[0, 1] = 0
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(round_tokens(x, 8), fake_quantize(x, scale, zero, args))


def test_files_give_back_the_same_grids_and_the_same_bytes(tmp_path: Path) -> None:
    zero = torch.ones(64, 8, dtype=torch.int8)
    grids = {
        "b.c": replace(grid_of(8, torch.bfloat16), activation_bits=8, activation_scale=torch.ones(1)),
        "a": replace(grid_of(4, torch.float32, 32), zero_point_OG=zero),
    }
    write_grids(tmp_path, grids)
    first = (tmp_path / GRIDS_FILE).read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / GRIDS_FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode
    back = read_grids(tmp_path)
    assert sorted(back) == ["a", "b.c"]
    assert torch.equal(back["a"].zero_point_OG, zero)
    assert back["a"].activation_scale is None
    assert torch.equal(back["b.c"].activation_scale, torch.ones(1))
    assert all(same_grid(back[name], grids[name]) for name in grids)
    write_grids(tmp_path, dict(reversed(grids.items())))
    assert (tmp_path / GRIDS_FILE).read_bytes() == first


def test_no_file_is_no_grids_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert read_grids(tmp_path) == {}
    (tmp_path / GRIDS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0damaged!")
    with pytest.raises(FormatError, match=r"grids\.safetensors: expected the grids of a quantised model"):
        read_grids(tmp_path)


def test_same_grid_sees_every_difference() -> None:
    grid = grid_of(4, torch.float32, 32)
    changed = grid.scale_OG.clone()
    changed[3, 1] *= 1.0001
    assert same_grid(grid, Grid(bits=4, scale_OG=grid.scale_OG.clone(), group_size=32))
    assert not same_grid(grid, Grid(bits=8, scale_OG=grid.scale_OG, group_size=32))
    assert not same_grid(grid, Grid(bits=4, scale_OG=grid.scale_OG.double(), group_size=32))
    assert not same_grid(grid, Grid(bits=4, scale_OG=changed, group_size=32))
    assert not same_grid(grid, replace(grid, number="nf4"))
    assert not same_grid(grid, replace(grid, zero_point_OG=torch.zeros(64, 8, dtype=torch.int8)))
    assert not same_grid(grid, None)
    assert same_grid(None, None)


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(
        FormatError, match=r"scales of shape \(64, 4\) for a weight \(64, 128\), groups of 32"
    ):
        grid_of(4, torch.float32, 32).quantize(torch.zeros(64, 128))


def test_bits_per_weight() -> None:
    assert grid_of(4, torch.bfloat16, 32).bits_per_weight(256) == 4.5
    assert grid_of(8, torch.float32).bits_per_weight(256) == 8.125
