"""Movement: weights become zero that training moves towards zero, whatever their size.

Each weight has a score that learns beside it, as if the mask let everything through: it rises while the
weight moves away from zero. Layers compute with the weights of the highest scores; the others wait, and may
come back. Scores learn at the learning rate of the weights.

Paper: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020,
https://arxiv.org/abs/2005.07683; hard movement pruning, on the cubic schedule of gradual magnitude.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from compresskit.sparse.base import Moment
from compresskit.sparse.gradual import Gradual
from compresskit.sparse.pattern import Block, Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement(Gradual):
    """Zeros by learned scores; the share of them rises every ``update_every`` steps."""

    masks_forward: ClassVar[bool] = True
    learns_scores: ClassVar[bool] = True

    @staticmethod
    def unfit(pattern: Pattern) -> str:
        """Scores are of single weights and may be negative: those of a block have no sum that counts."""
        return "a pattern of single weights, such as 80%:layer" if isinstance(pattern, Block) else ""

    def update(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """What a layer computes with, and in the end what is saved of it.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            moment: where training stands, with the scores.

        Returns:
            The weight (O, I), zero where scores are lowest, in as many places as there should be zeros now.
        """
        assert moment.score_OI is not None
        early = moment.step < self.last(moment.steps)
        since = moment.step % self.update_every if early else 0
        return self.pruned(weight_OI, moment.score_OI, replace(moment, step=moment.step - since))
