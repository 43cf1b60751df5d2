"""Gradual magnitude: more and more of the smallest weights become zero while the others learn to do without.

Many zeros are made at first, when there is much to spare, and few at last.

Paper: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
https://arxiv.org/abs/1710.01878; equation 1.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from compresskit.errors import Fault
from compresskit.options import Within
from compresskit.sparse.base import Moment
from compresskit.sparse.pattern import Pattern
from compresskit.sparse.timetable import Timetable


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradual(Timetable):
    """Zeros by magnitude on a cubic schedule; what is zero once stays zero.

    Attributes:
        pattern: of the zeros there are at the end; of 2:4 first 3:4 is made.
        begin: share of the steps before the first zeros.
        end: share of the steps after which all zeros are there; what is left recovers, and a learning rate
            that falls should not be spent by then.
    """

    regrows: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    masks_forward: ClassVar[bool] = False
    learns_scores: ClassVar[bool] = False
    learns_masks: ClassVar[bool] = False

    pattern: Pattern
    begin: Annotated[float, Within(0, 1)] = 0.0
    end: Annotated[float, Within(0, 1, above=True)] = 0.5

    @staticmethod
    def unfit(pattern: Pattern) -> str:
        """Nothing: zeros of any pattern can be made a few at a time."""
        return ""

    def faults(self, where: str) -> list[Fault]:
        """Of a schedule that ends before it begins, which would make all zeros in one step."""
        if self.begin < self.end:
            return []
        return [
            Fault(
                f"{where}.begin", f"less than end: {self.end}", f"{self.begin}", "Lower begin, or raise end."
            )
        ]

    def patterns(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Pattern]:
        """The same for every layer."""
        return dict.fromkeys(shapes, self.pattern)

    def share(self, step: int, steps: int) -> float:
        """Of the zeros there are at the end, those there should be after ``step`` of ``steps``, in [0, 1]."""
        first, last = round(self.begin * steps), self.last(steps)
        if step >= last:
            return 1.0
        return 1 - (1 - (step - first) / (last - first)) ** 3 if step > first else 0.0

    def update(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """Zero the smallest weights, as many as there should be zeros now; zeros are the smallest of all.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            moment: where training stands.

        Returns:
            The weight (O, I) with at least the zeros it had.
        """
        return self.pruned(weight_OI, weight_OI.abs(), moment)

    def pruned(self, weight_OI: Tensor, score_OI: Tensor, moment: Moment) -> Tensor:
        """The weight (O, I), zero where ``score_OI`` is lowest, in as many places as the schedule says."""
        pattern = self.pattern.eased(self.share(moment.step, moment.steps))
        if pattern is None or (moment.step < self.last(moment.steps) and pattern.misfit(*weight_OI.shape)):
            return weight_OI  # so few that not one of a row or layer is due yet
        return weight_OI.where(pattern.keep_largest(score_OI), 0)
