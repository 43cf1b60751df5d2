"""The layout ``gap``: of each kept weight, in four bits, how many zeros of its row stand before it.

A run of more than 15 zeros has a -0.0 kept after every fifteenth; rows are filled up with -0.0 to whole
groups of eight. For batch 1 and 2, and weights most of which are zero: no work at all is done for a zero, and
from 78% zeros on no mask takes fewer bytes.

A kept -0.0 is stored as 0.0: nothing else of a weight is changed.

Shapes: O = outputs, I = inputs, K = kept weights, E = those and what fills up, G = groups of eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.bitmap import Bitmap, kept_per_row, pack_bits, unpack_bits
from compresskit.kernels.packed.base import Case, Packed
from compresskit.kernels.packed.floats import FILLED, cuda_refusal, filled_zeros, is_filling
from compresskit.kernels.packed.rules import complete, runner

GROUP = 8
FARTHEST = 16
"""Places from one kept weight to the next, at most."""
MOST_TOKENS = 4
SHIFTS = (0, 8, 16, 24, 4, 12, 20, 28)
"""Where in a word the gap of each of eight weights begins."""


@dataclass(frozen=True, slots=True)
class Gap:
    """The tensors are, in this order:

    * values_G8: (G, 8) bf16 or fp16, row by row.
    * gaps_G: (G,) int32, four bits for each value; where they begin is ``SHIFTS``.
    * starts: int32 (O + 1,); row o has the groups from ``starts[o]`` to ``starts[o + 1]``.
    * width_I0: (I, 0): only its shape says something.
    """

    op: str = "gap_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        if case.tokens > MOST_TOKENS:
            return f"it is made for {MOST_TOKENS} tokens at most, not {case.tokens}"
        refused = cuda_refusal(case, self.op)
        if refused:
            return refused
        from compresskit.kernels.cuda.gap_linear import width_refusal  # asks the GPU

        return width_refusal(case.in_features)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``."""
        mask_OB = weight.mask_OB.to(device)
        row_K, input_K = unpack_bits(mask_OB, weight.in_features).nonzero().unbind(1)
        before_K = torch.cat((input_K.new_full((1,), -1), input_K[:-1]))[: len(input_K)]
        first_K = torch.cat((row_K.new_full((1,), -1), row_K[:-1]))[: len(row_K)] != row_K
        gap_K = input_K - torch.where(first_K, -1, before_K) - 1
        entries_K = gap_K // FARTHEST + 1
        last_K = entries_K.cumsum(0) - 1
        entries = int(entries_K.sum())
        value_E = torch.full((entries,), FILLED, dtype=weight.values_K.dtype, device=device)
        value_E[last_K] = filled_zeros(weight.values_K.to(device))
        gap_E = torch.full((entries,), FARTHEST - 1, dtype=torch.int64, device=device)
        gap_E[last_K] = gap_K % FARTHEST

        kept_O = kept_per_row(mask_OB)
        row_ends = pad(entries_K.cumsum(0), (1, 0))[kept_O.cumsum(0)]
        row_entries_O = row_ends.diff(prepend=row_ends.new_zeros(1))
        starts = pad((-(-row_entries_O // GROUP)).cumsum(0), (1, 0))
        shift_O = starts[:-1] * GROUP - (row_ends - row_entries_O)
        at_E = torch.arange(entries, device=device) + shift_O.repeat_interleave(row_entries_O)
        groups = int(starts[-1])
        values = torch.full((groups * GROUP,), FILLED, dtype=value_E.dtype, device=device)
        gaps = torch.zeros(groups * GROUP, dtype=torch.int64, device=device)
        values[at_E], gaps[at_E] = value_E, gap_E
        words_G = (gaps.view(-1, GROUP) << torch.tensor(SHIFTS, device=device)).sum(-1)
        width_I0 = torch.empty(weight.in_features, 0, device=device)
        return values.view(-1, GROUP), words_G.to(torch.int32), starts.to(torch.int32), width_I0

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit but for a kept -0.0, on the CPU."""
        dense_OI = scattered(*(tensor.cpu() for tensor in packed))
        keep_OI = ~is_filling(dense_OI)
        return Bitmap(mask_OB=pack_bits(keep_OI), values_K=dense_OI[keep_OI].clone(), in_features=in_features)

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        float64 is there for checks: the reference alone computes in it.
        """
        out: Tensor = gap_linear(inputs, *packed, bias_O)
        return out


def scattered(values_G8: Tensor, gaps_G: Tensor, starts: Tensor, width_I0: Tensor) -> Tensor:
    """The dense weight (O, I) in the values' type, -0.0 where nothing is kept."""
    outputs, inputs = len(starts) - 1, width_I0.shape[0]
    dense_OI = values_G8.new_full((outputs, inputs), FILLED)
    steps_G8 = (gaps_G[:, None] >> torch.tensor(SHIFTS, device=gaps_G.device) & 15) + 1
    until_E = pad(steps_G8.flatten().long().cumsum(0), (1, 0))
    counts_O = starts.diff().long()
    row_G = torch.arange(outputs, device=starts.device).repeat_interleave(counts_O)
    begun_G = until_E[starts[:-1].long() * GROUP].repeat_interleave(counts_O)
    input_G8 = until_E[1:].view(-1, GROUP) - begun_G[:, None] - 1
    real_G8 = ~is_filling(values_G8)
    row_G8 = row_G[:, None].expand(-1, GROUP)
    dense_OI[row_G8[real_G8], input_G8[real_G8]] = values_G8[real_G8]
    return dense_OI


@torch.library.custom_op("compresskit::gap_linear", mutates_args=())
def gap_linear(
    inputs: Tensor,
    values_G8: Tensor,
    gaps_G: Tensor,
    starts: Tensor,
    width_I0: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """The op of this layout; see :class:`Gap` for the arguments.

    Raises:
        ValueError: inputs of another width than the weight's.
    """
    if inputs.shape[-1] != width_I0.shape[0]:
        raise ValueError(
            f"gap_linear: the weight has {width_I0.shape[0]} inputs, the inputs {inputs.shape[-1]}"
        )
    run = runner("gap_linear", inputs.device, inputs.dtype)
    return run(inputs, values_G8, gaps_G, starts, width_I0, bias_O)


@torch.library.custom_op("compresskit::gap_expand", mutates_args=())
def gap_expand(
    values_G8: Tensor, gaps_G: Tensor, starts: Tensor, width_I0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``."""
    run = runner("gap_expand", values_G8.device, dtype)
    return run(values_G8, gaps_G, starts, width_I0, in_features, dtype)


complete(gap_linear, gap_expand, outputs=lambda packed: packed[2].shape[0] - 1)
