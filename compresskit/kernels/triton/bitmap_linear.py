"""The product with a weight in the layout ``bitmap``. Shapes: ``packed/bitmap.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compresskit.kernels.triton.product import Division, divided, flags_of, multiplied, scaled, written


@triton.jit
def bitmap_kernel(
    inputs,
    words,
    values,
    starts,
    scales,
    bias,
    out,
    tokens,
    rows,
    width,
    row_words,
    groups,
    group_width,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """A program sums ROWS outputs of TOKENS tokens, a word of 64 inputs at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)  # times a width
    place = tl.arange(0, 64)
    at = tl.load(starts + row, mask=row < rows, other=0)
    sums = tl.zeros((ROWS, 64 if TOKENS == 1 else TOKENS), tl.float32)
    for word in range(0, row_words):
        bits = tl.load(words + row.to(tl.int64) * row_words + word, mask=row < rows, other=0)
        kept = ((bits[:, None] >> place[None, :]) & 1).to(tl.int32)
        before = tl.cumsum(kept, 1) - kept
        weight = tl.load(values + at[:, None] + before, mask=kept != 0, other=0)
        at += tl.sum(kept, 1)
        input_ = word * 64 + place
        weight = scaled(weight, scales, row, input_, rows, groups, group_width, HAS_SCALES)
        sums = multiplied(sums, weight, inputs, token, input_, tokens, width, TOKENS, NARROW)
    written(sums, out, bias, row, token, rows, tokens, TOKENS, HAS_BIAS)


def bitmap_linear(
    inputs: Tensor,
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32.

    Args:
        inputs: (..., I).
        words_OW, values_S, starts, scales_OG: the packed weight.
        bias_O: of any type, or None.
    """
    groups = scales_OG.shape[1]
    flags = {**flags_of(inputs, values_S, bias_O), "HAS_SCALES": groups > 0}

    def run(division: Division, inputs_NI: Tensor, out_NO: Tensor, tiles: dict[str, Any]) -> None:
        width = inputs_NI.shape[1]
        sizes = (*out_NO.shape, width, words_OW.shape[1], groups, width // max(1, groups))
        tensors = (inputs_NI, words_OW, values_S, starts, scales_OG, bias_O, out_NO)
        bitmap_kernel[division.grid](*tensors, *sizes, **tiles, **flags)

    return divided(inputs, words_OW.shape[0], run)
