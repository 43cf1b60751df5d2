"""What a runtime does to activations; the files say only how many bits."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.formats.grid import FLOAT8_MAX, Grid


def round_tokens(x_BTI: Tensor, bits: int) -> Tensor:
    """Round activations onto ``bits`` with one symmetric scale per token, as compressed-tensors runs w8a8.

    Args:
        x_BTI: (batch, tokens, I); the last dimension shares a scale.
        bits: 8 for w8a8.

    Returns:
        The rounded activations, same shape and dtype; the arithmetic is done in that dtype.
    """
    scale = x_BTI.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return _round(x_BTI, scale.where(scale != 0, torch.finfo(x_BTI.dtype).eps), bits)


def round_inputs(x_BTI: Tensor, grid: Grid) -> Tensor:
    """Round a layer's input as ``grid`` says; the same shape and dtype."""
    if grid.activation_bits is None:
        return x_BTI
    if grid.number == "float":
        scale = x_BTI.abs().amax(-1, keepdim=True) / FLOAT8_MAX
        scale = scale.where(scale != 0, torch.finfo(x_BTI.dtype).eps)
        rounded: Tensor = (x_BTI / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        return rounded.to(x_BTI.dtype) * scale
    if grid.activation_scale is not None:
        return _round(x_BTI, grid.activation_scale, grid.activation_bits)
    return round_tokens(x_BTI, grid.activation_bits)


def _round(x_BTI: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    rounded: Tensor = (x_BTI / scale).clamp(-half, half - 1).round() * scale
    return rounded
