"""The gradient of the values of the layout ``bitmap``. Shapes: ``packed/bitmap.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.bitmap import unpack_bits
from compresskit.kernels.reference.dense_gradient import dense_gradient


def bitmap_gradient(
    grad: Tensor, inputs: Tensor, words_OW: Tensor, values_S: Tensor, starts: Tensor, scales_OG: Tensor
) -> Tensor:
    """Like ``values_S``: what the dense weight's gradient has where a weight is kept; 0 in the slack."""
    out_S, end = torch.zeros_like(values_S), 0
    for rows, dense_RI in dense_gradient(grad, inputs):
        kept = dense_RI.masked_select(unpack_bits(words_OW[rows].view(torch.uint8), inputs.shape[-1]))
        begin, end = end, end + len(kept)
        out_S[begin:end] = kept
    return out_S
