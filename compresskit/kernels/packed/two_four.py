"""The layout ``two_four``: of every four consecutive inputs two values, and two bits that say where each is.

Rows are filled up with zeros to whole words of 64 inputs, so that each has as many values and starts where
its number says. A group that keeps fewer than two stores zeros, and says so by places that do not rise:

* two kept: (p, q) with p < q, and their values;
* one kept at p: (p, p), and its value and a zero, in this order; for p = 3 a zero and its value;
* none kept: (1, 0), and two zeros.

So the weight is the sum of values at their places whichever it is, and of a group's values the first always
belongs to the lower of two different places (p and p + 1; 0 and 3; 0 and 1), as hardware that takes two of
four wants it.

Shapes: O = outputs, I = inputs, W = words of a row = ceil(I / 64), S = 32 W values of each row and the slack,
G = groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.bitmap import PIECE_WEIGHTS, Bitmap, pack_bits, unpack, unpack_bits
from compresskit.kernels.packed.base import SLACK_BYTES, Case, Packed
from compresskit.kernels.packed.rules import (
    GROUP,
    check_width,
    complete,
    require_two_of_four,
    runner,
    two_of_four_refusal,
    type_refusal,
)

WORD_INPUTS = 64
WORD_VALUES = 32


@dataclass(frozen=True, slots=True)
class TwoFour:
    """The tensors are, in this order:

    * values_S: two for every four inputs, row by row, then ``SLACK_BYTES`` of zeros: a kernel may read 64
      bytes from where any value begins. They have a gradient.
    * places_OW: int64; bits ``4 g`` and ``4 g + 1`` of a word are the place of its group g's first value,
      the next two that of its second.
    * scales_OG: fp32, of int8 values; (O, 0) for other values.
    """

    op: str = "two_four_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        return two_of_four_refusal(case) or type_refusal(case)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``.

        Raises:
            PatternError: four consecutive inputs of it keep more than two.
        """
        here = replace(weight, mask_OB=weight.mask_OB.cpu(), values_K=weight.values_K.cpu(), scales_OG=None)
        keep_OI, dense_OI = unpack_bits(here.mask_OB, here.in_features), unpack(here)
        fill = (0, -weight.in_features % WORD_INPUTS)
        keep_OF4, dense_OF4 = (pad(t, fill).reshape(len(t), -1, GROUP) for t in (keep_OI, dense_OI))
        require_two_of_four(keep_OF4, "two_four")
        values_OF2 = dense_OF4.new_empty(*keep_OF4.shape[:2], 2)
        places_OF = torch.empty(keep_OF4.shape[:2], dtype=torch.uint8, device="cpu")
        rows = max(1, PIECE_WEIGHTS // max(1, weight.in_features))
        for row in range(0, len(keep_OF4), rows):  # places are int64, many times the weight's bytes
            part = slice(row, row + rows)
            low_RF, high_RF = _places(keep_OF4[part], keep_OF4[part].sum(-1))
            values_OF2[part] = dense_OF4[part].gather(-1, torch.stack(slots(low_RF, high_RF), -1))
            places_OF[part] = (low_RF | high_RF << 2).to(torch.uint8)
        bytes_OB = places_OF[:, ::2] | places_OF[:, 1::2] << GROUP
        scales_OG = weight.scales_OG
        if scales_OG is None:
            scales_OG = torch.empty(len(keep_OI), 0, device="cpu")
        made = (
            pad(values_OF2.flatten(), (0, SLACK_BYTES // values_OF2.itemsize)),
            bytes_OB.contiguous().view(torch.int64),
            scales_OG.float().contiguous(),
        )
        return tuple(tensor.to(device) for tensor in made)

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit, on the CPU."""
        values_S, places_OW, scales_OG = (tensor.cpu() for tensor in packed)
        values_OF2 = row_values(values_S, places_OW)
        low_OF, high_OF = unpack_places(places_OW)
        first_OF, second_OF = slots(low_OF, high_OF)
        dense_OF4 = values_S.new_zeros(*low_OF.shape, GROUP)
        dense_OF4.scatter_(-1, torch.stack((first_OF, second_OF), -1), values_OF2)
        keep_OF4 = torch.zeros(dense_OF4.shape, dtype=torch.bool, device="cpu")
        keep_OF4.scatter_(
            -1, torch.stack((low_OF, high_OF), -1), (low_OF <= high_OF)[..., None].expand(-1, -1, 2)
        )
        keep_OI, dense_OI = keep_OF4.flatten(1)[:, :in_features], dense_OF4.flatten(1)[:, :in_features]
        return Bitmap(
            mask_OB=pack_bits(keep_OI),
            values_K=dense_OI[keep_OI],
            in_features=in_features,
            scales_OG=scales_OG if scales_OG.shape[1] else None,
        )

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        float64 is there for checks: the reference alone computes in it.
        """
        out: Tensor = two_four_linear(inputs, *packed, bias_O)
        return out


def row_values(values_S: Tensor, places_OW: Tensor) -> Tensor:
    """The values of every group of four, (O, 16 W, 2), without the slack."""
    outs, words = places_OW.shape
    return values_S[: outs * words * WORD_VALUES].view(outs, -1, 2)


def unpack_places(places_OW: Tensor) -> tuple[Tensor, Tensor]:
    """Both places of every group of four, int64 (O, 16 W)."""
    bytes_OB = places_OW.view(torch.uint8)
    places_OF = torch.stack((bytes_OB & 15, bytes_OB >> GROUP), -1).flatten(1).long()
    return places_OF & 3, places_OF >> 2


def slots(low_OF: Tensor, high_OF: Tensor) -> tuple[Tensor, Tensor]:
    """Two different places of every group, rising: where its first and its second value go."""
    one_OF = low_OF == high_OF
    first_OF = torch.where(one_OF & (low_OF == GROUP - 1), 0, torch.minimum(low_OF, high_OF))
    second_OF = torch.where(one_OF & (low_OF < GROUP - 1), low_OF + 1, torch.maximum(low_OF, high_OF))
    return first_OF, second_OF


def _places(keep_OF4: Tensor, count_OF: Tensor) -> tuple[Tensor, Tensor]:
    """As the module's docstring says, from which are kept and how many."""
    low_OF = keep_OF4.to(torch.uint8).argmax(-1)
    high_OF = GROUP - 1 - keep_OF4.flip(-1).to(torch.uint8).argmax(-1)
    none_OF = count_OF == 0
    return low_OF.masked_fill(none_OF, 1), high_OF.masked_fill(none_OF, 0)


@torch.library.custom_op("compresskit::two_four_linear", mutates_args=())
def two_four_linear(
    inputs: Tensor, values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """The op of this layout; see :class:`TwoFour` for the arguments.

    Raises:
        ValueError: inputs of another width than the weight's.
    """
    check_width("two_four_linear", inputs, places_OW.shape[1], WORD_INPUTS)
    run = runner("two_four_linear", inputs.device, inputs.dtype)
    return run(inputs, values_S, places_OW, scales_OG, bias_O)


@torch.library.custom_op("compresskit::two_four_expand", mutates_args=())
def two_four_expand(
    values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``, int8 values multiplied by their scales."""
    run = runner("two_four_expand", values_S.device, dtype)
    return run(values_S, places_OW, scales_OG, in_features, dtype)


@torch.library.custom_op("compresskit::two_four_gradient", mutates_args=())
def two_four_gradient(
    grad: Tensor, inputs: Tensor, values_S: Tensor, places_OW: Tensor, scales_OG: Tensor
) -> Tensor:
    """The gradient of ``values_S``, in its type, from that of the outputs; what only fills up has zeros."""
    run = runner("two_four_gradient", inputs.device, inputs.dtype)
    with torch.autocast(inputs.device.type, enabled=False):  # it would make products in fp32 narrow again
        return run(grad, inputs, values_S, places_OW, scales_OG)


complete(
    two_four_linear,
    two_four_expand,
    outputs=lambda packed: packed[1].shape[0],
    gradient=two_four_gradient,
)
