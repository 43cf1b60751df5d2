"""Blocks of GGUF, the file that llama.cpp loads: our integers as they are, scales rounded to float16.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A block is 32 inputs of one row: a float16
scale, for ``Q4_1`` a float16 minimum too, then the integers; of 4 bits, input j stands in the low and input
j + 16 in the high half of byte j. Our groups are multiples of 32 inputs, so a group's scale is repeated.

Shapes: O = out_features, I = in_features, G = groups along I, N = blocks along I, B = bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.errors import Fault, FormatError
from compresskit.formats.grid import Grid

BLOCK = 32
BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2, "Q4_1": 4 + BLOCK // 2}


def block_kind(bits: int, *, symmetric: bool) -> str | None:
    """The kind of block that holds integers of ``bits``: ``Q8_0``, ``Q4_0``, ``Q4_1``; None if none does."""
    return {(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1"}.get((bits, symmetric))


def encode_blocks(layer: str, weight_OI: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """The bytes of a weight that lies on an integer grid.

    Args:
        layer: its name, for errors.
        weight_OI: (O, I); I and the group size are multiples of 32.
        grid: of 8 or 4 bits; with zero points only of 4.

    Returns:
        uint8 (O, B), and the largest relative change of a scale (or minimum) by its rounding to float16.

    Raises:
        FormatError: a scale is too large or too small for float16.
    """
    rows, inputs = weight_OI.shape
    kind = block_kind(grid.bits, symmetric=grid.zero_point_OG is None)
    q_ONM = grid.quantize(weight_OI).reshape(rows, -1, BLOCK)
    scale_ON, change = _half(layer, _per_block(grid.scale_OG, inputs))
    heads = [scale_ON]
    if grid.zero_point_OG is not None:
        least_ON = -(_per_block(grid.zero_point_OG, inputs).double() + 2 ** (grid.bits - 1))
        least_ON, other = _half(layer, least_ON * _per_block(grid.scale_OG, inputs).double())
        heads.append(least_ON)
        change = max(change, other)
    if kind == "Q8_0":
        body_ONB = q_ONM.contiguous().view(torch.uint8)
    else:
        unsigned_ONM = (q_ONM + 2 ** (grid.bits - 1)).to(torch.uint8)
        low, high = unsigned_ONM.split(BLOCK // 2, dim=-1)
        body_ONB = low | (high << 4)
    parts = [head.contiguous().view(torch.uint8).reshape(rows, -1, 2) for head in heads]
    return torch.cat([*parts, body_ONB], dim=-1).reshape(rows, -1), change


def _per_block(values_OG: Tensor, inputs: int) -> Tensor:
    return values_OG.repeat_interleave(inputs // BLOCK // values_OG.shape[1], dim=1)


def _half(layer: str, values_ON: Tensor) -> tuple[Tensor, float]:
    """``values_ON`` in float16, and the largest relative change; zeros stay zeros."""
    half_ON = values_ON.to(torch.float16)
    wide_ON = values_ON.double()
    change_ON = (half_ON.double() - wide_ON).abs() / wide_ON.abs().where(wide_ON != 0, 1)
    worst = float(change_ON.max())
    if not worst <= 0.5:  # not a number where one became infinite
        least, most = float(wide_ON.abs().min()), float(wide_ON.abs().max())
        cure = "Export this model to compressed-tensors, which keeps scales as they are."
        raise FormatError(
            Fault(layer, "scales that float16 holds", f"scales from {least:.3g} to {most:.3g}", cure)
        )
    return half_ON, worst
