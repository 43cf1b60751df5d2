"""Starts ``tile_linear.cu``; many tokens take the dense weight. Shapes: ``packed/tile.py``; N = tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

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
from compresskit.kernels.cuda.tile_expand import ring_bytes, slot_bytes, tile_expand

MOST_TOKENS = 16
STEP_INPUTS = 128
SLOTS = (3, 2)
"""Packets of a warp's ring; the fewer where a GPU has little room, or a weight few zeros."""
ROW_BYTES = 16
"""Of a token in shared memory, beyond its inputs."""


def tile_linear(
    inputs: Tensor, packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O); sums are taken in fp32.

    Args:
        inputs: (..., I) on a GPU, of the values' type.
        packets_H, starts_ST, extents_OZ0: the packed weight.
        bias_O: of any type, or None.

    Raises:
        ValueError: inputs and values differ in type.
    """
    check_types("tile_linear", inputs, extents_OZ0)
    width = inputs.shape[-1]
    if inputs.numel() > MOST_TOKENS * width:
        weight_OI = tile_expand(packets_H, starts_ST, extents_OZ0, width, inputs.dtype)
        return linear(inputs, weight_OI, None if bias_O is None else bias_O.to(inputs.dtype))
    strips, steps = starts_ST.shape[0], starts_ST.shape[1] - 1

    def run(inputs_NI: Tensor, bias_O: Tensor | None, out_NO: Tensor) -> None:
        tokens = len(inputs_NI)
        blocks = token_blocks(tokens, MOST_TOKENS // 8)
        machine = launch.machine(inputs.device.index or 0)
        step_bytes = STEP_INPUTS * tokens * inputs.element_size()
        fixed_bytes = {
            slots: WARPS * blocks * 8 * STRIDE_BYTES + ring_bytes(extents_OZ0, slots) + tokens * ROW_BYTES
            for slots in SLOTS
        }
        roomy = fixed_bytes[SLOTS[0]] + min(steps, WARPS) * step_bytes <= machine.two_blocks_bytes
        slots = SLOTS[0] if roomy else SLOTS[1]
        division = split(
            machine,
            strips=strips,
            steps=steps,
            step_bytes=step_bytes,
            fixed_bytes=fixed_bytes[slots],
            round_steps=WARPS,
        )
        parts = room_for_parts(division.chunks, out_NO)
        sizes = [strips, steps, division.chunk_steps, tokens, inputs_NI.shape[1], out_NO.shape[1]]
        launch.start(
            "tile_linear",
            {"BF16": FLOAT16[inputs.dtype], "TOKEN_BLOCKS": blocks, "RING_SLOTS": slots},
            (division.blocks, division.chunks),
            THREADS,
            division.shared_bytes,
            [packets_H, starts_ST, inputs_NI, bias_O, out_NO, parts, slot_bytes(extents_OZ0), *sizes],
        )
        put_together(parts, bias_O, out_NO)

    return in_turns(inputs, extents_OZ0.shape[0], bias_O, MOST_TOKENS, run)
