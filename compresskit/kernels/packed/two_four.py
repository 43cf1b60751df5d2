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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import Fault, PatternError
from compresskit.kernels.bitmap import Bitmap, pack_bits, unpack_bits
from compresskit.kernels.packed.base import SLACK_BYTES, Case, Packed
from compresskit.kernels.packed.rules import check_width, gradients, runner, type_refusal

WORD_INPUTS = 64
WORD_VALUES = 32
GROUP = 4


@dataclass(frozen=True, slots=True)
class TwoFour:
    """The tensors are, in this order:

    * values_S: two for every four inputs, row by row, then ``SLACK_BYTES`` of zeros: a kernel may read 64
      bytes from where any value begins.
    * places_OW: int64; bits ``4 g`` and ``4 g + 1`` of a word are the place of its group g's first value,
      the next two that of its second.
    * scales_OG: fp32, of int8 values; (O, 0) for other values.
    """

    op: str = "two_four_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        if case.group is None:
            return "nothing says that no four consecutive inputs keep more than two"
        keep, of = case.group
        if not ((keep <= 2 and of % GROUP == 0) or (keep, of) == (1, 2)):
            return f"of {of} consecutive inputs {keep} are kept, which may be more than two of four"
        return type_refusal(case)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``.

        Raises:
            PatternError: four consecutive inputs of it keep more than two.
        """
        keep_OI = unpack_bits(weight.mask_OB.cpu(), weight.in_features)
        dense_OI = torch.zeros(keep_OI.shape, dtype=weight.values_K.dtype)
        dense_OI[keep_OI] = weight.values_K.cpu()
        fill = (0, -weight.in_features % WORD_INPUTS)
        keep_OF4, dense_OF4 = (pad(t, fill).reshape(len(t), -1, GROUP) for t in (keep_OI, dense_OI))
        count_OF = keep_OF4.sum(-1)
        if bool((count_OF > 2).any()):
            row, group = (count_OF > 2).nonzero()[0].tolist()
            got = f"{int(count_OF[row, group])} in group {group} of row {row}"
            cure = "Choose another layout for this weight."
            raise PatternError(Fault("two_four", "two kept weights of every four at most", got, cure))
        low_OF, high_OF = _places(keep_OF4, count_OF)
        values_OF2 = dense_OF4.gather(-1, torch.stack(_slots(low_OF, high_OF), -1))
        places_OF = (low_OF | high_OF << 2).to(torch.uint8)
        bytes_OB = places_OF[:, ::2] | places_OF[:, 1::2] << GROUP
        scales_OG = torch.empty(len(keep_OI), 0) if weight.scales_OG is None else weight.scales_OG
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
        first_OF, second_OF = _slots(low_OF, high_OF)
        dense_OF4 = values_S.new_zeros(*low_OF.shape, GROUP)
        dense_OF4.scatter_(-1, torch.stack((first_OF, second_OF), -1), values_OF2)
        keep_OF4 = torch.zeros(dense_OF4.shape, dtype=torch.bool)
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


def _places(keep_OF4: Tensor, count_OF: Tensor) -> tuple[Tensor, Tensor]:
    """As the module's docstring says, from which are kept and how many."""
    low_OF = keep_OF4.to(torch.uint8).argmax(-1)
    high_OF = GROUP - 1 - keep_OF4.flip(-1).to(torch.uint8).argmax(-1)
    none_OF = count_OF == 0
    return low_OF.masked_fill(none_OF, 1), high_OF.masked_fill(none_OF, 0)


def _slots(low_OF: Tensor, high_OF: Tensor) -> tuple[Tensor, Tensor]:
    """Two different places of every group, rising: where its first and its second value go."""
    one_OF = low_OF == high_OF
    first_OF = torch.where(one_OF & (low_OF == GROUP - 1), 0, torch.minimum(low_OF, high_OF))
    second_OF = torch.where(one_OF & (low_OF < GROUP - 1), low_OF + 1, torch.maximum(low_OF, high_OF))
    return first_OF, second_OF


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


@two_four_linear.register_fake
def _(inputs: Tensor, values_S: Tensor, *rest: Any) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], rest[0].shape[0]))


@torch.library.custom_op("compresskit::two_four_expand", mutates_args=())
def two_four_expand(
    values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``, int8 values multiplied by their scales."""
    run = runner("two_four_expand", values_S.device, dtype)
    return run(values_S, places_OW, scales_OG, in_features, dtype)


@two_four_expand.register_fake
def _(values_S: Tensor, *rest: Any) -> Tensor:
    places_OW, _, in_features, dtype = rest
    return values_S.new_empty((places_OW.shape[0], in_features), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.in_features, ctx.bias_type = inputs[0].shape[-1], None if inputs[4] is None else inputs[4].dtype
    ctx.save_for_backward(*inputs[1:4])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(
        ctx, grad, lambda: two_four_expand(*ctx.saved_tensors, ctx.in_features, grad.dtype), arguments=5
    )


two_four_linear.register_autograd(_gradients, setup_context=_save)
