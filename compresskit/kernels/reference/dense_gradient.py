"""The gradient of a dense weight, some of its rows at a time.

Shapes: O = outputs, I = inputs, N = tokens, R = rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from compresskit.kernels.chunking import gradient_rows
from compresskit.kernels.reference.projection import accumulator


def dense_gradient(grad: Tensor, inputs: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and what the gradient of a dense weight has there, (R, I): summed over tokens in fp32 at least.

    Args:
        grad: of the outputs, (..., O).
        inputs: (..., I).
    """
    wide, width, outs = accumulator(inputs.dtype), inputs.shape[-1], grad.shape[-1]
    inputs_NI, grad_NO = inputs.reshape(-1, width).to(wide), grad.reshape(-1, outs)
    step = gradient_rows(width, inputs.device.type)
    for start in range(0, outs, step):
        rows = slice(start, min(start + step, outs))
        yield rows, grad_NO[:, rows].to(wide).T @ inputs_NI
