"""The product with a weight in the layout ``two_four``. Shapes: ``packed/two_four.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compresskit.kernels.triton.product import Division, divided, flags_of, multiplied, scaled, written


@triton.jit
def two_four_kernel(
    inputs,
    values,
    places,
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
    group = place // 4
    sums = tl.zeros((ROWS, 64 if TOKENS == 1 else TOKENS), tl.float32)
    for word in range(0, row_words):
        at = row.to(tl.int64) * row_words + word
        bits = tl.load(places + at, mask=row < rows, other=0)[:, None] >> (group * 4)[None, :]
        first = values + at[:, None] * 32 + (group * 2)[None, :]
        is_first = ((bits & 3) == (place % 4)[None, :]) & (row < rows)[:, None]
        is_second = (((bits >> 2) & 3) == (place % 4)[None, :]) & (row < rows)[:, None]
        weight = tl.load(first, mask=is_first, other=0) + tl.load(first + 1, mask=is_second, other=0)
        input_ = word * 64 + place
        weight = scaled(weight, scales, row, input_, rows, groups, group_width, HAS_SCALES)
        sums = multiplied(sums, weight, inputs, token, input_, tokens, width, TOKENS, NARROW)
    written(sums, out, bias, row, token, rows, tokens, TOKENS, HAS_BIAS)


def two_four_linear(
    inputs: Tensor, values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32.

    Args:
        inputs: (..., I).
        values_S, places_OW, scales_OG: the packed weight.
        bias_O: of any type, or None.
    """
    groups = scales_OG.shape[1]
    flags = {**flags_of(inputs, values_S, bias_O), "HAS_SCALES": groups > 0}

    def run(division: Division, inputs_NI: Tensor, out_NO: Tensor, tiles: dict[str, Any]) -> None:
        width = inputs_NI.shape[1]
        sizes = (*out_NO.shape, width, places_OW.shape[1], groups, width // max(1, groups))
        tensors = (inputs_NI, values_S, places_OW, scales_OG, bias_O, out_NO)
        two_four_kernel[division.grid](*tensors, *sizes, **tiles, **flags)

    return divided(inputs, places_OW.shape[0], run)
