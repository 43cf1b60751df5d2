"""Every quantizer of the table keeps the contract; rounding against the slow loop and compressed-tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import SchemeError
from compresskit.quant import QUANTIZERS
from compresskit.quant.affine import SHRINKS, grid_for, least_error_grid
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import parse

SCHEMES = [
    "w8a8",
    "w8a16",
    "w4a16-g32",
    "w4a16-channel",
    "w4a16-g32-asym",
    "w4a8-g32",
    "fp8",
    "nf4",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantizer(name: str) -> Any:
    cls: Any = QUANTIZERS[name]
    return cls()


def stats() -> LayerStats:
    torch.manual_seed(5)
    x = torch.randn(40, 64)
    return LayerStats(num_tokens=40, input_sq_mean_I=x.square().mean(0), input_gram_II=x.t() @ x / 40)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name: str, dtype: torch.dtype, scheme: str, layout: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(16, 64, dtype=dtype).where(torch.rand(16, 64) > 0.5, 0)
    weight[3] = 0
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "strided":
        weight = weight.repeat_interleave(2, dim=1)[:, ::2]
    before = weight.clone()
    got = quantizer(name).quantize(weight, parse(scheme), stats())
    assert torch.equal(weight, before), "quantize() must not modify its input"
    assert (got.weight_OI.shape, got.weight_OI.dtype, got.weight_OI.device) == (
        weight.shape,
        dtype,
        weight.device,
    )
    assert got.grid.scale_OG.dtype == dtype
    assert bool((got.grid.scale_OG > 0).all())
    assert torch.equal(got.grid.snap(got.weight_OI), got.weight_OI), "every weight lies on the grid"
    assert not got.weight_OI[before == 0].any(), "zeros stay zeros"
    assert not torch.signbit(got.weight_OI[before == 0]).any()
    want = parse(scheme)
    assert (got.grid.bits, got.grid.group_size) == (want.weight_bits, want.group_size)
    assert (got.grid.number, got.grid.activation_bits) == (want.number, want.activation_bits)
    assert (got.grid.zero_point_OG is None) == want.symmetric
    again = quantizer(name).quantize(weight.contiguous(), parse(scheme), stats())
    assert torch.equal(again.weight_OI, got.weight_OI)


def test_rounding_is_the_slow_loop() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 8)
    got = RoundToNearest().quantize(weight, parse("w4a16-g4")).weight_OI
    for o in range(3):
        for g in range(0, 8, 4):
            group = weight[o, g : g + 4]
            scale = (group.abs().max() * 2 / 15).item()
            for j, w in enumerate(group.tolist()):
                nearest = min(range(-8, 8), key=lambda q: abs(q * scale - w))
                assert got[o, g + j].item() == pytest.approx(nearest * scale, rel=1e-6)


@pytest.mark.parametrize(("scheme", "size"), [("w8a8", None), ("w4a16-g32", 32), ("w4a16-channel", None)])
def test_rounding_is_that_of_compressed_tensors(scheme: str, size: int | None) -> None:
    torch.manual_seed(0)
    weight, bits = torch.randn(16, 64), parse(scheme).weight_bits
    args = QuantizationArgs(num_bits=bits, strategy="group" if size else "channel", group_size=size)
    grouped = weight.view(16, -1, size or 64)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    want = fake_quantize(weight, scale, zero, args)
    got = RoundToNearest().quantize(weight, parse(scheme))
    torch.testing.assert_close(got.grid.scale_OG, scale)
    torch.testing.assert_close(got.weight_OI, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_at_most_half_a_step(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    got = RoundToNearest().quantize(weight, parse(f"w{bits}a16-channel" if bits == 4 else "w8a16"))
    steps = (got.weight_OI - weight).abs() / got.grid.scale_OG
    assert steps.max() <= 0.5 + 1e-3


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "nf4", "fp8"])
def test_the_least_error_is_that_of_trying_every_range(scheme: str) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(4, 64) ** 3, torch.rand(64)
    form = parse(scheme)
    groups = 64 // (form.group_size or 64)

    def errors(weight: torch.Tensor, shrink: float) -> torch.Tensor:
        error = (grid_for(weight, form, shrink).snap(weight) - weight).square() * importance
        return error.reshape(4, groups, -1).sum(-1)

    tried = torch.stack([errors(weight, shrink) for shrink in SHRINKS])
    got = least_error_grid(weight, form, importance).snap(weight) - weight
    torch.testing.assert_close((got.square() * importance).reshape(4, groups, -1).sum(-1), tried.amin(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_weights_have_a_scale_to_divide_by(dtype: torch.dtype) -> None:
    weight = torch.full((2, 64), torch.finfo(dtype).smallest_normal).to(dtype)
    weight[1] = 0
    grid = grid_for(weight, parse("w8a16"))
    assert bool((grid.scale_OG > 0).all())
    assert grid.scale_OG[1].item() == 1
    assert bool(torch.isfinite(grid.snap(weight)).all())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(SchemeError, match=r"divisible by the group size 32, got 43\. Choose a group size"):
        RoundToNearest().quantize(torch.randn(2, 43), parse("w4a16-g32"))
    bad = torch.randn(2, 64)
    bad[0, 0] = torch.nan
    with pytest.raises(SchemeError, match="expected finite weights, got inf or nan"):
        RoundToNearest().quantize(bad, parse("w8a8"))
