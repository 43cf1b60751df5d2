"""What methods share that move zeros about: some weights are dropped, and as many grow elsewhere.

A weight that grows starts at a number next to nothing instead of at zero, since the zeros are the mask: held
as they are, a weight at zero would get no gradient. Its next step, of the size of the learning rate, is all
that its value comes from.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.options import Within
from compresskit.sparse.base import Moment
from compresskit.sparse.erk import erk_zero_fractions
from compresskit.sparse.pattern import LayerUnstructured, Pattern, smallest
from compresskit.sparse.timetable import Timetable

GROWN = 1e-8
"""What a weight that grows starts at; too small to change what the model computes in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewiring(Timetable):
    """Dropping by magnitude and growing by :meth:`growth`; as many zeros from the first step to the last.

    Training starts from the weights there are, of which the smallest become zero before the first step.

    Attributes:
        pattern: of the zeros of all layers together; the layers' own follow from their shapes.
        drop_fraction: of a layer's weights, the share that the first change replaces; then a cosine to 0.
    """

    regrows: ClassVar[bool] = True
    masks_forward: ClassVar[bool] = False
    learns_scores: ClassVar[bool] = False
    learns_masks: ClassVar[bool] = False

    pattern: Pattern
    drop_fraction: Annotated[float, Within(0, 1)] = 0.3

    @staticmethod
    def unfit(pattern: Pattern) -> str:
        """Weights grow anywhere in a layer."""
        return "" if isinstance(pattern, LayerUnstructured) else "a share of layers, such as 80%:layer"

    def patterns(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Pattern]:
        """Erdos-Renyi densities: see :mod:`compresskit.sparse.erk`."""
        fractions = erk_zero_fractions(shapes, self.pattern.zero_fraction)
        wanted = {n: LayerUnstructured(f) for n, f in fractions.items() if 0 < f < 1}
        return {n: pattern for n, pattern in wanted.items() if not pattern.misfit(*shapes[n])}

    def dropped(self, step: int, steps: int) -> float:
        """The share of a layer's weights to replace after ``step`` of ``steps``."""
        return self.drop_fraction / 2 * (1 + cos(pi * min(step / self.last(steps), 1)))

    def growth(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """A score (O, I), fp32, for each weight that might grow: the highest do."""
        raise NotImplementedError

    def knows(self, moment: Moment) -> bool:
        """Whether there is something to grow by; else all zeros stay where they are."""
        return True

    def update(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """Drop the smallest weights and let as many grow; one dropped and grown at once keeps its value.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            moment: where training stands.

        Returns:
            The weight (O, I), with exactly the zeros of the pattern; the same one where nothing is known.
        """
        if moment.step == 0:
            return weight_OI.where(self.pattern.keep_largest(weight_OI.abs()), 0)
        if not self.knows(moment):
            return weight_OI
        weight_N = weight_OI.flatten()
        size, alive_N = weight_N.numel(), weight_N != 0
        alive, wanted = int(alive_N.sum()), size - round(self.pattern.zero_fraction * size)
        count = max(round(self.dropped(moment.step, moment.steps) * alive), alive - wanted)
        keep_N = alive_N & ~smallest(weight_N.abs().masked_fill(~alive_N, torch.inf), count)
        growth_N = self.growth(weight_OI, moment).flatten().masked_fill(keep_N, -torch.inf)
        grow_N = smallest(-growth_N, wanted - (alive - count))
        made_N = weight_N.where(keep_N | grow_N, 0).masked_fill(grow_N & ~alive_N, GROWN)
        return made_N.view(weight_OI.shape)
