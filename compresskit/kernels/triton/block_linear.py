"""The product with a weight in the layout ``block``. Shapes: ``packed/block.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compresskit.kernels.triton.product import Division, divided, flags_of, multiplied, written


@triton.jit
def block_kernel(
    inputs,
    values,
    columns,
    starts,
    bias,
    out,
    tokens,
    rows,
    width,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """A program sums a row of blocks, ROWS outputs, for TOKENS tokens."""
    line = tl.program_id(0)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)  # times a width
    place = tl.arange(0, 16)
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, 16 if TOKENS == 1 else TOKENS), tl.float32)
    for at in range(tl.load(starts + line), tl.load(starts + line + 1)):
        input_ = tl.load(columns + at) * 16 + place
        block = values + tl.cast(at, tl.int64) * (ROWS * 16)
        weight = tl.load(block + row[:, None] * 16 + place[None, :])
        sums = multiplied(sums, weight, inputs, token, input_, tokens, width, TOKENS, NARROW)
    written(sums, out, bias, line * ROWS + row, token, rows, tokens, TOKENS, HAS_BIAS)


def block_linear(
    inputs: Tensor,
    values_B16x16: Tensor,
    columns_B: Tensor,
    starts: Tensor,
    extents_OC0: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32.

    Args:
        inputs: (..., I).
        values_B16x16, columns_B, starts, extents_OC0: the packed weight.
        bias_O: of any type, or None.
    """
    flags = flags_of(inputs, values_B16x16, bias_O)

    def run(division: Division, inputs_NI: Tensor, out_NO: Tensor, tiles: dict[str, Any]) -> None:
        tensors = (inputs_NI, values_B16x16, columns_B, starts, bias_O, out_NO)
        block_kernel[division.grid](*tensors, *out_NO.shape, inputs_NI.shape[1], **tiles, **flags)

    return divided(inputs, extents_OC0.shape[0], run)
