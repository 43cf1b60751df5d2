"""Wanda: zero the weights whose |w| * ||x|| matters least to each output.

Paper: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large
Language Models", ICLR 2024, https://arxiv.org/abs/2306.11695.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.sparse.base import Pruned
from compresskit.sparse.pattern import Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda:
    """One-shot pruning; kept weights are not changed.

    Scores compete only within one output row, so every output keeps the same number of
    inputs. Costs one selection per layer and no matrix inverse.

    Attributes:
        pattern: which zeros are allowed, e.g. ``NM(keep=2, of=4)``.
    """

    pattern: Pattern
    needs: ClassVar[frozenset[str]] = frozenset({"input_sq_mean"})

    def prune(self, weight_OI: Tensor, stats: LayerStats) -> Pruned:
        """Zero the lowest-scoring weights of one linear layer; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            stats: must hold ``input_sq_mean_I``: float32 (I,), squared activation units.

        Returns:
            The pruned weight (O, I) in ``weight_OI``'s dtype, and its keep-mask.

        Raises:
            StatisticError: ``input_sq_mean_I`` is missing, misshapen or not finite.
            PatternError: ``pattern`` does not fit (O, I). The plan checks this first.
        """
        keep_OI = self.pattern.keep_largest(self.score(weight_OI, stats))
        return Pruned(weight_OI=weight_OI.where(keep_OI, 0), keep_OI=keep_OI)

    def score(self, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        """What each weight matters: float32 (O, I), in weight times activation units; see :meth:`prune`."""
        sq_mean_I = stats.require_input_sq_mean(weight_OI.shape[1])
        # The paper's ||x_j|| is a sum over tokens; the mean ranks weights alike.
        return weight_OI.float().abs() * sq_mean_I.sqrt()
