"""Whole blocks, rows by columns of a weight.

Shapes: O = out_features, I = in_features, B = some of the inputs, R, C = rows and columns of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from compresskit.sparse.pattern.base import at_most, percent, refuse, require_fit, require_fraction, zeros
from compresskit.sparse.pattern.select import smallest

CHUNK = 1 << 18
"""Scores that are squared at a time: as many as stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Block:
    """Zero a fraction of the blocks of a layer, wherever the least is lost; a block goes or stays whole.

    Blocks are compared by the sum of the squares of their scores. For magnitudes that is the block's energy,
    for Wanda what the output loses if inputs are not correlated, for SparseGPT the sum of what each weight
    costs at best, and for ALPS the distance to the weights with these blocks zeroed.

    Attributes:
        zero_fraction: of the blocks, in (0, 1); the count is rounded to the nearest.
        rows: outputs of a block.
        columns: inputs of a block.
        pad: whether blocks need not divide the layer. It then counts as filled up with outputs and inputs
            that are zero: blocks at its end are short, and count as others do.
    """

    zero_fraction: float
    rows: int
    columns: int
    pad: bool = False

    def __post_init__(self) -> None:
        require_fraction(self.zero_fraction)
        if self.rows < 1 or self.columns < 1:
            refuse("pattern", str(self), "blocks of at least 1x1, such as 50%:16x16")

    def __str__(self) -> str:
        return f"{percent(self.zero_fraction)}:{self.rows}x{self.columns}{':pad' * self.pad}"

    def misfit(self, out_features: int, in_features: int) -> str:
        """Blocks have to divide the layer; rounding has to leave at least one to zero and one to keep."""
        sides = (("out_features", out_features, self.rows), ("in_features", in_features, self.columns))
        odd = [f"{name} divisible by {side}" for name, size, side in sides if size % side]
        if odd and not self.pad:
            return " and ".join(odd)
        count = self.count(out_features, in_features)
        if 0 < round(self.zero_fraction * count) < count:
            return ""
        return f"so many blocks that {percent(self.zero_fraction)} of them rounds to one and leaves one"

    @property
    def padded(self) -> Block:
        """With blocks that may be short."""
        return replace(self, pad=True)

    def count(self, out_features: int, in_features: int) -> int:
        """How many blocks such a layer has."""
        return -(-out_features // self.rows) * -(-in_features // self.columns)

    @property
    def unit(self) -> int:
        """The inputs of a block."""
        return self.columns

    @property
    def units_compete(self) -> bool:
        """Zero blocks are counted over the layer."""
        return True

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Keep the blocks whose scores come to the most; PatternError if blocks do not fit."""
        require_fit(self, score_OI)
        return self.keep_part(score_OI, 0)

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The layer has its share of zero blocks by then, to the nearest."""
        sum_RC = self.summed(score_OB)
        before = start // self.columns * len(sum_RC)
        count = round(self.zero_fraction * (before + sum_RC.numel())) - round(self.zero_fraction * before)
        keep_RC = smallest(sum_RC.flatten(), count).logical_not_().view(sum_RC.shape)
        keep_OB = keep_RC.repeat_interleave(self.columns, 1).repeat_interleave(self.rows, 0)
        return keep_OB[: score_OB.shape[0], : score_OB.shape[1]]

    def summed(self, score_OI: Tensor) -> Tensor:
        """What blocks are compared by: (R, C), fp32, the sum of squares of each block's scores."""
        some = max(1, CHUNK // score_OI.shape[1] // self.rows) * self.rows
        parts = []
        for part in torch.split(score_OI, some):
            # In one order of memory, so that sums are rounded alike whatever the strides.
            square = part.contiguous().float().clamp(min=0).square_()
            # The last part alone may have a short row of blocks.
            square = functional.pad(square, (0, -part.shape[1] % self.columns, 0, -len(part) % self.rows))
            by_column = square.view(len(square), -1, self.columns).sum(-1)
            parts.append(by_column.view(-1, self.rows, by_column.shape[1]).sum(1))
        return torch.cat(parts)

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Count the blocks that are zero; if there are too few, name those that lack the fewest zeros."""
        require_fit(self, zero_OI)
        alive_RC = self.summed(~zero_OI).int()
        wanted = round(self.zero_fraction * alive_RC.numel())
        few = max(0, wanted - int((alive_RC == 0).sum()))
        alive_N = alive_RC.flatten()
        order_N = alive_N.masked_fill(alive_N == 0, torch.iinfo(torch.int32).max).argsort(stable=True)
        return at_most(
            (self._lack(n, int(alive_N[n]), alive_RC.shape[1], zero_OI) for n in order_N[:few].tolist()), few
        )

    def _lack(self, at: int, alive: int, across: int, zero_OI: Tensor) -> str:
        """A sentence on the block at place ``at``, with ``across`` blocks side by side."""
        row, column = at // across * self.rows, at % across * self.columns
        size = zero_OI[row : row + self.rows, column : column + self.columns].numel()
        return f"block at row {row}, input {column}: {zeros(size - alive)} of {size}"

    def eased(self, share: float) -> Block | None:
        """Fewer blocks."""
        return replace(self, zero_fraction=share * self.zero_fraction) if share > 0 else None
