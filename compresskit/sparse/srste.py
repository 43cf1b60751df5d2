"""SR-STE: layers compute with the largest N of every M weights, and the others go on learning unseen.

The gradient passes the mask as if there were none ("straight through"), so that a weight left out may come
back; a pull towards zero on those left out keeps groups from changing their minds at every step.

Paper: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021,
https://arxiv.org/abs/2102.04010; equation 9.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from compresskit.options import Within
from compresskit.sparse.base import Moment
from compresskit.sparse.pattern import NM, Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class SRSTE:
    """N:M that is chosen anew in every pass, until training ends.

    Attributes:
        pattern: N:M.
        pull: added to the gradient of a weight that is left out, times the weight.
    """

    regrows: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    masks_forward: ClassVar[bool] = True
    learns_scores: ClassVar[bool] = False
    learns_masks: ClassVar[bool] = False

    pattern: Pattern
    pull: Annotated[float, Within(0)] = 2e-4

    @staticmethod
    def unfit(pattern: Pattern) -> str:
        """Groups are few weights each, chosen among in every pass."""
        return "" if isinstance(pattern, NM) else "N:M, such as 2:4"

    def patterns(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Pattern]:
        """The same for every layer."""
        return dict.fromkeys(shapes, self.pattern)

    def due(self, step: int, steps: int) -> bool:
        """Never: every pass has its own zeros."""
        return False

    def update(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """What a layer computes with, and what is saved of it.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            moment: not used.

        Returns:
            The weight (O, I), zero but for the largest of each group.
        """
        return weight_OI.where(self.pattern.keep_largest(weight_OI.abs()), 0)
