"""Starts ``tile_expand.cu``. Shapes: ``packed/tile.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.chunks import FLOAT16, THREADS, WARPS

SLOTS = 2
"""Packets of a warp's ring."""
SLACK_BYTES = 16
"""Past a packet: the last weight's value is loaded whether it is kept or not."""
BLOCKS = 4
"""Of threads, for each multiprocessor."""


def tile_expand(
    packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``.

    Args:
        packets_H, starts_ST, extents_OZ0: the packed weight, on a GPU.
        in_features: I.
        dtype: any floating one.
    """
    outputs = extents_OZ0.shape[0]
    dense_OI = extents_OZ0.new_empty((outputs, in_features))
    strips, steps = starts_ST.shape[0], starts_ST.shape[1] - 1
    if dense_OI.numel():
        blocks = launch.machine(packets_H.device.index or 0).multiprocessors * BLOCKS
        launch.start(
            "tile_expand",
            {"BF16": FLOAT16[extents_OZ0.dtype], "RING_SLOTS": SLOTS},
            (min(-(-strips * steps // WARPS), blocks), 1),
            THREADS,
            ring_bytes(extents_OZ0, SLOTS),
            [
                packets_H,
                starts_ST,
                dense_OI,
                slot_bytes(extents_OZ0),
                steps,
                strips * steps,
                in_features,
                outputs,
            ],
        )
    return dense_OI.to(dtype)


def slot_bytes(extents_OZ0: Tensor) -> int:
    """Room for the largest packet, and what is read past it."""
    return extents_OZ0.shape[1] * 16 + SLACK_BYTES


def ring_bytes(extents_OZ0: Tensor, slots: int) -> int:
    """Of the rings of all warps of a block, with four barriers each."""
    return WARPS * (slots * slot_bytes(extents_OZ0) + 4 * 8)
