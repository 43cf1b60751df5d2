"""The layout ``fragment``: a 2:4 weight in the order in which a warp of a GPU holds it to multiply.

A strip is 16 outputs, a step 64 inputs, two instructions of 32. Each lane of a warp reads 16 bytes of values
for either instruction, and one word that says where the values of both belong. Which lane holds what is told
in ``cuda/fragment_linear.cu``; weights are filled up with zeros to whole strips and steps.

A group of four inputs that keeps fewer than two has -0.0 in place of the others, and so a kept -0.0 is stored
as 0.0: nothing else of a weight is changed.

Shapes: O = outputs, I = inputs, S = strips = ceil(O / 16), T = steps = ceil(I / 64), C = groups of four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.bitmap import Bitmap, pack_bits, unpack_bits
from compresskit.kernels.packed.base import Case, Packed
from compresskit.kernels.packed.floats import FILLED, cuda_refusal, filled_zeros, is_filling
from compresskit.kernels.packed.rules import (
    GROUP,
    check_width,
    complete,
    require_two_of_four,
    runner,
    two_of_four_refusal,
)

STRIP = 16
STEP = 64


@dataclass(frozen=True, slots=True)
class Fragment:
    """The tensors are, in this order:

    * values_ST64x8: (S, T, 64, 8) bf16 or fp16; first the values of 32 lanes for the lower 32 inputs of a
      step, then those for the upper ones.
    * places_ST32: (S, T, 32) int32, a word of each lane.
    * rows_O0: (O, 0): only its shape says something.
    """

    op: str = "fragment_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        return two_of_four_refusal(case) or cuda_refusal(case, self.op)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``.

        Raises:
            PatternError: four consecutive inputs of it keep more than two.
        """
        keep_OI = unpack_bits(weight.mask_OB.to(device), weight.in_features)
        dense_OI = torch.full(keep_OI.shape, FILLED, dtype=weight.values_K.dtype, device=device)
        dense_OI[keep_OI] = filled_zeros(weight.values_K.to(device))
        fill = (0, -weight.in_features % STEP, 0, -weight.out_features % STRIP)
        keep_RC4 = _in_groups(pad(keep_OI, fill))
        dense_RC4 = _in_groups(pad(dense_OI, fill, value=FILLED))
        require_two_of_four(keep_RC4, "fragment")
        first_kept_RC4 = (~keep_RC4).to(torch.uint8).argsort(dim=-1, stable=True)
        places_RC2 = first_kept_RC4[..., :2].sort(dim=-1).values
        values_RC2 = dense_RC4.gather(-1, places_RC2)
        rows_O0 = torch.empty(weight.out_features, 0, device=device)
        return _in_lanes(values_RC2), _in_words(places_RC2), rows_O0

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit but for a kept -0.0, on the CPU."""
        dense_OI = scattered(*(tensor.cpu() for tensor in packed))[:, :in_features]
        keep_OI = ~is_filling(dense_OI)
        return Bitmap(mask_OB=pack_bits(keep_OI), values_K=dense_OI[keep_OI].clone(), in_features=in_features)

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        float64 is there for checks: the reference alone computes in it.
        """
        out: Tensor = fragment_linear(inputs, *packed, bias_O)
        return out


def scattered(values_ST64x8: Tensor, places_ST32: Tensor, rows_O0: Tensor) -> Tensor:
    """The dense weight (O, 64 T) in the values' type, -0.0 where nothing is kept."""
    strips, steps = places_ST32.shape[:2]
    values = values_ST64x8.view(strips, steps, 2, 8, 4, 2, 2, 2)
    values_RC2 = values.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(strips * STRIP, steps * STEP // GROUP, 2)
    shifts = torch.arange(0, 32, 4, device=places_ST32.device)
    nibbles = (places_ST32[..., None] >> shifts & 15).view(strips, steps, 8, 2, 2, 2, 4)
    nibbles_RC = nibbles.permute(0, 5, 2, 1, 3, 4, 6).reshape(strips * STRIP, -1).long()
    dense_RC4 = values_RC2.new_full((*nibbles_RC.shape, GROUP), FILLED)
    dense_RC4.scatter_(-1, torch.stack((nibbles_RC & 3, nibbles_RC >> 2), -1), values_RC2)
    return dense_RC4.flatten(1)[: rows_O0.shape[0]]


def _in_groups(weight_RI: Tensor) -> Tensor:
    return weight_RI.reshape(len(weight_RI), -1, GROUP)


def _in_lanes(values_RC2: Tensor) -> Tensor:
    """(R, C, 2) -> (S, T, 64, 8): strip, half of its rows, row, step, instruction, quarter, place, value."""
    split = values_RC2.reshape(-1, 2, 8, values_RC2.shape[1] // 16, 2, 2, 4, 2)
    strips, steps = split.shape[0], split.shape[3]
    return split.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(strips, steps, 64, 8).contiguous()


def _in_words(places_RC2: Tensor) -> Tensor:
    """(R, C, 2) -> (S, T, 32): a lane is row, instruction, half of its groups; bits half of rows, group."""
    nibbles_RC = places_RC2[..., 0] | places_RC2[..., 1] << 2
    split = nibbles_RC.reshape(-1, 2, 8, nibbles_RC.shape[1] // 16, 2, 2, 4)
    lanes = split.permute(0, 3, 2, 4, 5, 1, 6).flatten(-2)
    words = (lanes << torch.arange(0, 32, 4, device=lanes.device)).sum(-1)
    return words.flatten(2).to(torch.int32).contiguous()


@torch.library.custom_op("compresskit::fragment_linear", mutates_args=())
def fragment_linear(
    inputs: Tensor, values_ST64x8: Tensor, places_ST32: Tensor, rows_O0: Tensor, bias_O: Tensor | None
) -> Tensor:
    """The op of this layout; see :class:`Fragment` for the arguments.

    Raises:
        ValueError: inputs of another width than the weight's.
    """
    check_width("fragment_linear", inputs, places_ST32.shape[1], STEP)
    run = runner("fragment_linear", inputs.device, inputs.dtype)
    return run(inputs, values_ST64x8, places_ST32, rows_O0, bias_O)


@torch.library.custom_op("compresskit::fragment_expand", mutates_args=())
def fragment_expand(
    values_ST64x8: Tensor, places_ST32: Tensor, rows_O0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``."""
    run = runner("fragment_expand", values_ST64x8.device, dtype)
    return run(values_ST64x8, places_ST32, rows_O0, in_features, dtype)


complete(fragment_linear, fragment_expand, outputs=lambda packed: packed[2].shape[0])
