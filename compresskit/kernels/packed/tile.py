"""The layout ``tile``: mask bits and kept values in packets that a warp decodes to operands of tensor cores.

A strip is 16 outputs, a step 128 inputs, a packet what one strip keeps of one step: two tiles of 64 inputs.
It is 64 words of mask bits and the kept values in the order of the bits, filled up with zeros to a multiple
of 16 bytes. Which bit stands for which weight is told in ``cuda/tile.cuh``. For zeros that lie anywhere; the
weight is filled up with zeros to whole strips and steps.

Shapes: O = outputs, I = inputs, S = strips = ceil(O / 16), T = steps = ceil(I / 128), P = packets = S x T,
H = halves of a word, Z = largest packet in units of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.bitmap import Bitmap, pack_bits, unpack_bits
from compresskit.kernels.packed.base import Case, Packed
from compresskit.kernels.packed.floats import cuda_refusal
from compresskit.kernels.packed.rules import check_width, complete, runner

STRIP = 16
STEP = 128
WEIGHTS = STRIP * STEP
MASK_HALVES = WEIGHTS // 16
UNIT_HALVES = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """The tensors are, in this order:

    * packets_H: int16, bits of masks and of values.
    * starts_ST: (S, T + 1) int32, in units of 16 bytes; the last of a row is where the packet ends that is
      the last of its strip.
    * extents_OZ0: (O, Z, 0): only its shape says something, and its type, that of the values.
    """

    op: str = "tile_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        return cuda_refusal(case, self.op)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``."""
        keep_OI = unpack_bits(weight.mask_OB.to(device), weight.in_features)
        dense_OI = torch.zeros(keep_OI.shape, dtype=weight.values_K.dtype, device=device)
        dense_OI[keep_OI] = weight.values_K.to(device)
        fill = (0, -weight.in_features % STEP, 0, -weight.out_features % STRIP)
        keep_PW, dense_PW = _in_packets(pad(keep_OI, fill)), _in_packets(pad(dense_OI, fill))
        count_P = keep_PW.sum(-1)
        units_P = (MASK_HALVES + count_P + UNIT_HALVES - 1) // UNIT_HALVES
        starts_P1 = pad(units_P.cumsum(0), (1, 0))
        packets_H = dense_PW.new_zeros(int(starts_P1[-1]) * UNIT_HALVES, dtype=torch.int16)

        begin_P = starts_P1[:-1] * UNIT_HALVES
        mask_at = begin_P[:, None] + torch.arange(MASK_HALVES, device=device)
        packets_H[mask_at] = pack_bits(keep_PW).view(torch.int16)
        shift_P = begin_P + MASK_HALVES - (count_P.cumsum(0) - count_P)
        value_at = torch.arange(int(count_P.sum()), device=device) + shift_P.repeat_interleave(count_P)
        packets_H[value_at] = dense_PW[keep_PW].view(torch.int16)

        steps = -(-weight.in_features // STEP)
        ends_ST = starts_P1[1:].view(-1, steps)
        starts_ST = torch.cat((starts_P1[:-1].view(-1, steps), ends_ST[:, -1:]), 1)
        largest = int(units_P.max()) if len(units_P) else 0
        extents_OZ0 = dense_OI.new_empty(weight.out_features, largest, 0)
        return packets_H, starts_ST.to(torch.int32), extents_OZ0

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit, on the CPU."""
        keep_OI, dense_OI = (part[:, :in_features] for part in scattered(*(t.cpu() for t in packed)))
        return Bitmap(mask_OB=pack_bits(keep_OI), values_K=dense_OI[keep_OI].clone(), in_features=in_features)

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        float64 is there for checks: the reference alone computes in it.
        """
        out: Tensor = tile_linear(inputs, *packed, bias_O)
        return out


def scattered(packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor) -> tuple[Tensor, Tensor]:
    """Which weights are kept and the dense weight, both (O, 128 T)."""
    begin_P = starts_ST[:, :-1].flatten().long() * UNIT_HALVES
    at = begin_P[:, None] + torch.arange(MASK_HALVES, device=begin_P.device)
    keep_PW = unpack_bits(packets_H[at].view(torch.uint8), WEIGHTS)
    count_P = keep_PW.sum(-1)
    shift_P = begin_P + MASK_HALVES - (count_P.cumsum(0) - count_P)
    dense_PW = packets_H.new_zeros(keep_PW.shape)
    kept = torch.arange(int(count_P.sum()), device=begin_P.device)
    dense_PW[keep_PW] = packets_H[kept + shift_P.repeat_interleave(count_P)]
    steps, outputs = starts_ST.shape[1] - 1, extents_OZ0.shape[0]
    dense_OC = _from_packets(dense_PW, steps)[:outputs].view(extents_OZ0.dtype)
    return _from_packets(keep_PW, steps)[:outputs], dense_OC


def _in_packets(weight_RC: Tensor) -> Tensor:
    """(16 S, 128 T) -> (P, 2048): tile, group, lane and weight of a packet, as ``cuda/tile.cuh`` has them.

    The parts of a row are half and eighth, those of an input step, tile, quarter, group, weight.
    """
    split = weight_RC.reshape(-1, 2, 8, weight_RC.shape[1] // STEP, 2, 4, 8, 2)
    return split.permute(0, 3, 4, 6, 2, 5, 1, 7).reshape(-1, WEIGHTS)


def _from_packets(weight_PW: Tensor, steps: int) -> Tensor:
    """What :func:`_in_packets` was given."""
    split = weight_PW.view(-1, steps, 2, 8, 8, 4, 2, 2)
    return split.permute(0, 6, 4, 1, 2, 5, 3, 7).reshape(-1, steps * STEP)


@torch.library.custom_op("compresskit::tile_linear", mutates_args=())
def tile_linear(
    inputs: Tensor, packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor, bias_O: Tensor | None
) -> Tensor:
    """The op of this layout; see :class:`Tile` for the arguments.

    Raises:
        ValueError: inputs of another width than the weight's.
    """
    check_width("tile_linear", inputs, starts_ST.shape[1] - 1, STEP)
    run = runner("tile_linear", inputs.device, inputs.dtype)
    return run(inputs, packets_H, starts_ST, extents_OZ0, bias_O)


@torch.library.custom_op("compresskit::tile_expand", mutates_args=())
def tile_expand(
    packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``."""
    run = runner("tile_expand", packets_H.device, dtype)
    return run(packets_H, starts_ST, extents_OZ0, in_features, dtype)


complete(tile_linear, tile_expand, outputs=lambda packed: packed[2].shape[0])
