"""Fake quantisation against compressed-tensors, torchao and gradients written out."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn
from torch.nn.functional import linear

from compresskit.errors import SchemeError
from compresskit.quant.affine import grid_for
from compresskit.quant.fake import RoundedLinear, round_in_place, round_static, round_tokens
from compresskit.quant.scheme import parse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = ("w8a8", "w8a16", "w4a8-g32", "w4a16-g32", "w4a16-channel", "w4a16-g32-asym")


def rounded(
    scheme: str, scales: str, *, dtype: torch.dtype = torch.float32, passes: int = 0
) -> RoundedLinear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 24)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.1, 2, 24)[:, None])
        layer.weight[:, ::5] = 0
    round_in_place(layer, parse(scheme), scales=scales, dtype=dtype, observed_passes=passes)
    assert isinstance(layer, RoundedLinear)
    return layer


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3
    x[0, 0] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_as_compressed_tensors_does(dtype: torch.dtype) -> None:
    x = inputs(3, 7, 64, dtype=dtype)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(value=x, args=args, module=nn.Linear(1, 1))
    assert torch.equal(round_tokens(x, 8), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_inputs_are_rounded_as_compressed_tensors_does(dtype: torch.dtype) -> None:
    x, scale = inputs(3, 7, 64, dtype=dtype), torch.tensor([0.03], dtype=dtype)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False)
    expected = fake_quantize(x, scale, torch.zeros(1, dtype=torch.int8), args)
    assert torch.equal(round_static(x, scale), expected)


def test_values_are_torchaos() -> None:
    """The same scales and integers; only ties, half a step below a group's largest, may fall either way."""
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    layer = rounded("w4a16-g32", "dynamic")
    theirs = IntxFakeQuantizer(weights)(layer.weight.detach())
    mine = layer.operands(inputs(1, 64))[1]
    tied = layer.weight.reshape(24, 2, 32).abs()
    tied = (tied == tied.amax(-1, keepdim=True)).reshape(24, 64)
    torch.testing.assert_close(mine[~tied], theirs[~tied], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine, theirs, rtol=1 / 7 + 1e-6, atol=0)
    # It has no symmetric rounding per token; of a matrix of tokens, that is one scale per row.
    tokens, x = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True), inputs(9, 64)[1:]
    spread = x.abs() < x.abs().amax(-1, keepdim=True)
    theirs = IntxFakeQuantizer(tokens)(x)
    torch.testing.assert_close(round_tokens(x, 8)[spread], theirs[spread], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_multiplies_what_conversion_will_store(scheme: str, dtype: torch.dtype) -> None:
    layer, x = rounded(scheme, "dynamic", dtype=dtype), inputs(2, 5, 64)
    stored = layer.weight.detach().to(dtype)
    weight = grid_for(stored, parse(scheme)).snap(stored).float()
    given = round_tokens(x, 8) if "a8" in scheme else x
    assert torch.equal(layer(x), linear(given, weight, layer.bias))


@pytest.mark.parametrize("scales", ["dynamic", "fixed", "learned"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zero_and_nothing_is_replaced(scheme: str, scales: str) -> None:
    before = nn.Linear(64, 24)
    weight, bias = before.weight, before.bias
    round_in_place(before, parse(scheme), scales=scales, dtype=torch.float32, observed_passes=0)
    assert before.weight is weight
    assert before.bias is bias
    layer = rounded(scheme, scales)
    assert not layer.operands(inputs(1, 64))[1][:, ::5].any()
    assert {name for name, _ in layer.named_parameters()} - {"log_scale_OG"} == {"weight", "bias"}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32-asym"])
def test_a_range_that_follows_the_weights_stops_no_gradient(scheme: str) -> None:
    layer, x = rounded(scheme, "dynamic"), inputs(2, 5, 64).requires_grad_()
    out = layer(x)
    out.sum().backward()
    given, weight = layer.operands(x)
    assert layer.weight.grad is not None
    expected = given.detach().sum((0, 1)).expand_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-4)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


def written_out(layer: RoundedLinear, weight: Tensor, log_scale: Tensor) -> Tensor:
    """LSQ as its authors' pseudo-code has it, differentiated by autograd."""
    grid = layer.grid(layer.start_scale_OG)
    members = 64 // grid.scale_OG.shape[1]
    highest = 2 ** (grid.bits - 1) - 1
    scale = layer.start_scale_OG * log_scale.exp()
    slope = 1 / (members * highest) ** 0.5
    scale = (scale * slope + (scale - scale * slope).detach()).repeat_interleave(members, 1)
    zero = 0 if grid.zero_point_OG is None else grid.zero_point_OG.repeat_interleave(members, 1)
    level = weight / scale + zero
    nearest = level + (level.round() - level).detach()
    return (nearest.clamp(-highest - 1, highest) - zero) * scale


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a16"])
def test_learned_scales_have_the_papers_gradient(scheme: str) -> None:
    layer = rounded(scheme, "learned")
    with torch.no_grad():
        layer.log_scale_OG += torch.linspace(-0.3, 0.3, layer.log_scale_OG.numel()).view_as(
            layer.log_scale_OG
        )
    weight, log_scale = (t.detach().clone().requires_grad_() for t in (layer.weight, layer.log_scale_OG))
    upstream = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    found, expected = layer.operands(inputs(1, 64))[1], written_out(layer, weight, log_scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, true in ((layer.weight.grad, weight.grad), (layer.log_scale_OG.grad, log_scale.grad)):
        assert mine is not None
        assert true is not None
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    assert (layer.weight.grad == 0).any(), "nothing lay outside, so nothing was tested"


def test_outside_a_fixed_range_there_is_no_gradient() -> None:
    layer = rounded("w4a16-channel", "fixed")
    with torch.no_grad():
        layer.weight[3, 7] = 10
    layer(inputs(2, 64)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[3, 7] == 0
    assert layer.weight.grad[3, 6] != 0


def test_observers_watch_the_first_training_passes_only() -> None:
    layer, x = rounded("w8a8-static", "dynamic", passes=2), inputs(2, 5, 64)
    layer.eval()
    weight = layer.operands(x)[1]
    assert torch.equal(layer(x), linear(x, weight, layer.bias)), "nothing was observed, nothing is rounded"
    layer.train()
    layer(x)
    layer(x / 2)
    layer(x * 100)
    assert float(layer.input_max) == float(x.abs().max())
    scale = x.abs().max() * 2 / 255
    expected = (x / scale).round().clamp(-128, 127) * scale
    torch.testing.assert_close(layer.eval()(x), linear(expected, weight, layer.bias))
    far = (x * 100).requires_grad_()
    layer(far).sum().backward()
    assert far.grad is not None
    level = (far.detach() / scale).round()
    kept = torch.arange(64) % 5 != 0  # the other inputs meet zero weights
    assert torch.equal((far.grad == 0)[..., kept], ((level > 127) | (level < -128))[..., kept])


def test_a_scheme_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SchemeError, match="in_features divisible"):
        round_in_place(
            nn.Linear(60, 4), parse("w4a16-g32"), scales="fixed", dtype=torch.float32, observed_passes=0
        )
    with pytest.raises(SchemeError, match="Bilinear"):
        round_in_place(
            nn.Bilinear(4, 4, 4),  # type: ignore[arg-type]
            parse("w8a8"),
            scales="fixed",
            dtype=torch.float32,
            observed_passes=0,
        )
