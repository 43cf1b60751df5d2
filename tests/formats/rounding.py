"""What a runtime does to activations; the files say only how many bits."""

from __future__ import annotations

import torch
from torch import Tensor


def round_tokens(x_BTI: Tensor, bits: int) -> Tensor:
    """Round activations onto ``bits`` with one symmetric scale per token, as compressed-tensors runs w8a8.

    Args:
        x_BTI: (batch, tokens, I); the last dimension shares a scale.
        bits: 8 for w8a8.

    Returns:
        The rounded activations, same shape and dtype; the arithmetic is done in that dtype.
    """
    scale = x_BTI.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    scale = scale.where(scale != 0, torch.finfo(x_BTI.dtype).eps)
    half = 2 ** (bits - 1)
    rounded: Tensor = (x_BTI / scale).clamp(-half, half - 1).round() * scale
    return rounded
