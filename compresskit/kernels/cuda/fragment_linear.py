"""Starts ``fragment_linear.cu``. Shapes: ``packed/fragment.py``; N = tokens."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.chunks import (
    FLOAT16,
    STRIDE_BYTES,
    THREADS,
    WARPS,
    check_types,
    in_turns,
    put_together,
    room_for_parts,
    split,
    token_blocks,
)

MOST_TOKENS = 64
STEP_INPUTS = 64
ROUND_STEPS = 32
"""A multiple of so many steps leaves no warp without its share."""


def fragment_linear(
    inputs: Tensor, values_ST64x8: Tensor, places_ST32: Tensor, rows_O0: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O); sums are taken in fp32.

    Args:
        inputs: (..., I) on a GPU, of the values' type.
        values_ST64x8, places_ST32, rows_O0: the packed weight.
        bias_O: of any type, or None.

    Raises:
        ValueError: inputs and values differ in type.
    """
    check_types("fragment_linear", inputs, values_ST64x8)
    strips, steps = places_ST32.shape[:2]

    def run(inputs_NI: Tensor, bias_O: Tensor | None, out_NO: Tensor) -> None:
        tokens, width = inputs_NI.shape
        blocks = token_blocks(tokens, MOST_TOKENS // 8)
        division = split(
            launch.machine(inputs.device.index or 0),
            strips=strips,
            steps=steps,
            step_bytes=STEP_INPUTS * tokens * inputs.element_size(),
            fixed_bytes=WARPS * blocks * 8 * STRIDE_BYTES,
            round_steps=ROUND_STEPS,
        )
        parts = room_for_parts(division.chunks, out_NO)
        sizes = [strips, steps, division.chunk_steps, tokens, width, out_NO.shape[1]]
        launch.start(
            "fragment_linear",
            {"BF16": FLOAT16[inputs.dtype], "TOKEN_BLOCKS": blocks},
            (division.blocks, division.chunks),
            THREADS,
            division.shared_bytes,
            [values_ST64x8, places_ST32, inputs_NI, bias_O, out_NO, parts, *sizes],
        )
        put_together(parts, bias_O, out_NO)

    return in_turns(inputs, rows_O0.shape[0], bias_O, MOST_TOKENS, run)
