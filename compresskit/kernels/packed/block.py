"""The layout ``block``: blocks of 16 x 16 weights of which one at least is kept, whole, row of blocks by row.

For zeros that fill blocks of that size or of a multiple. Within a block what is not kept is -0.0, and so a
kept -0.0 is stored as 0.0: nothing else of a weight is changed. Weights are filled up to whole blocks.

Shapes: O = outputs, I = inputs, S = rows of blocks = ceil(O / 16), C = columns of blocks = ceil(I / 16),
B = blocks that are not all zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.bitmap import BYTE, Bitmap, pack_bits, unpack_bits
from compresskit.kernels.dispatch import refusal
from compresskit.kernels.packed.base import Case, Packed
from compresskit.kernels.packed.floats import FILLED, filled_zeros, is_filling
from compresskit.kernels.packed.rules import check_width, complete, runner, type_refusal

SIDE = 16
BYTES = SIDE // BYTE
"""Of a mask, in a row of a block."""
MOST_STORED = 1.1
"""Weights stored for one that is kept: more, and other layouts say where zeros are in less."""


@dataclass(frozen=True, slots=True)
class Block:
    """The tensors are, in this order:

    * values_B16x16: floating.
    * columns_B: int32, the column of each block.
    * starts: int32 (S + 1,); row s has the blocks from ``starts[s]`` to ``starts[s + 1]``.
    * extents_OC0: (O, C, 0): only its shape says something.
    """

    op: str = "block_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot, or must not, multiply in such a case; empty where it can."""
        if case.block is None:
            return "nothing says that zeros fill blocks"
        if case.block[0] % SIDE or case.block[1] % SIDE:
            return f"zeros fill blocks of {case.block[0]}x{case.block[1]}, no multiple of {SIDE}x{SIDE}"
        if case.device != "cuda":
            return f"it is made for a GPU's kernels, and the device is {case.device}"
        if case.values == torch.int8:
            return "values are int8, not floating"
        return type_refusal(case) or refusal("triton", self.op)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``."""
        keep_OI = unpack_bits(weight.mask_OB.to(device), weight.in_features)
        dense_OI = torch.full(keep_OI.shape, FILLED, dtype=weight.values_K.dtype, device=device)
        dense_OI[keep_OI] = filled_zeros(weight.values_K.to(device))
        fill = (0, -weight.in_features % SIDE, 0, -weight.out_features % SIDE)
        keep_SC = _in_blocks(pad(keep_OI, fill)).any(-1).any(-1)
        values_B16x16 = _in_blocks(pad(dense_OI, fill, value=FILLED))[keep_SC]
        columns_B = keep_SC.nonzero()[:, 1].to(torch.int32)
        starts = pad(keep_SC.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        extents_OC0 = torch.empty(weight.out_features, keep_SC.shape[1], 0, device=device)
        return values_B16x16, columns_B, starts, extents_OC0

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit but for a kept -0.0, on the CPU."""
        dense_OI = scattered(*(tensor.cpu() for tensor in packed))[:, :in_features]
        keep_OI = ~is_filling(dense_OI)
        return Bitmap(mask_OB=pack_bits(keep_OI), values_K=dense_OI[keep_OI].clone(), in_features=in_features)

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        float64 is there for checks: the reference alone computes in it.
        """
        out: Tensor = block_linear(inputs, *packed, bias_O)
        return out


def fills_blocks(weight: Bitmap) -> bool:
    """Whether zeros of ``weight`` fill whole blocks, so that storing the others takes next to no zeros."""
    mask_OB = weight.mask_OB
    sides = (0, -mask_OB.shape[1] % BYTES, 0, -len(mask_OB) % SIDE)
    bytes_SRCB = pad(mask_OB, sides).reshape(-(-len(mask_OB) // SIDE), SIDE, -1, BYTES)
    kept_SC = bytes_SRCB.any(-1).any(1)
    stored = int(kept_SC.sum())
    return stored < kept_SC.numel() and stored * SIDE**2 <= MOST_STORED * weight.values_K.numel()


def scattered(values_B16x16: Tensor, columns_B: Tensor, starts: Tensor, extents_OC0: Tensor) -> Tensor:
    """The dense weight (O, 16 C) in the values' type, -0.0 where nothing is kept."""
    outputs, columns = extents_OC0.shape[:2]
    rows = len(starts) - 1
    row_B = torch.arange(rows, device=starts.device).repeat_interleave(starts.diff().long())
    blocks = values_B16x16.new_full((rows, columns, SIDE, SIDE), FILLED)
    blocks[row_B, columns_B.long()] = values_B16x16
    return blocks.transpose(1, 2).reshape(rows * SIDE, columns * SIDE)[:outputs]


def _in_blocks(weight_RI: Tensor) -> Tensor:
    """(16 S, 16 C) -> (S, C, 16, 16)."""
    rows, inputs = weight_RI.shape
    return weight_RI.reshape(rows // SIDE, SIDE, inputs // SIDE, SIDE).transpose(1, 2)


@torch.library.custom_op("compresskit::block_linear", mutates_args=())
def block_linear(
    inputs: Tensor,
    values_B16x16: Tensor,
    columns_B: Tensor,
    starts: Tensor,
    extents_OC0: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """The op of this layout; see :class:`Block` for the arguments.

    Raises:
        ValueError: inputs of another width than the weight's.
    """
    check_width("block_linear", inputs, extents_OC0.shape[1], SIDE)
    run = runner("block_linear", inputs.device, inputs.dtype)
    return run(inputs, values_B16x16, columns_B, starts, extents_OC0, bias_O)


@torch.library.custom_op("compresskit::block_expand", mutates_args=())
def block_expand(
    values_B16x16: Tensor,
    columns_B: Tensor,
    starts: Tensor,
    extents_OC0: Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (O, I) in ``dtype``."""
    run = runner("block_expand", values_B16x16.device, dtype)
    return run(values_B16x16, columns_B, starts, extents_OC0, in_features, dtype)


complete(block_linear, block_expand, outputs=lambda packed: packed[3].shape[0])
