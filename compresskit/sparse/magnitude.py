"""Magnitude: zero the weights of least absolute value.

Paper: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
Networks", NeurIPS 2015, https://arxiv.org/abs/1506.02626.

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
class Magnitude:
    """One-shot pruning without data; kept weights are not changed.

    Attributes:
        pattern: which zeros are allowed, e.g. ``NM(keep=2, of=4)``.
    """

    pattern: Pattern
    needs: ClassVar[frozenset[str]] = frozenset()

    def prune(self, weight_OI: Tensor, stats: LayerStats | None = None) -> Pruned:
        """Zero the smallest weights of one linear layer; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            stats: not used.

        Returns:
            The pruned weight (O, I) in ``weight_OI``'s dtype, and its keep-mask.

        Raises:
            PatternError: ``pattern`` does not fit (O, I). The plan checks this first.
        """
        keep_OI = self.pattern.keep_largest(weight_OI.abs())
        return Pruned(weight_OI=weight_OI.where(keep_OI, 0), keep_OI=keep_OI)

    def score(self, weight_OI: Tensor, stats: LayerStats | None = None) -> Tensor:
        """What each weight matters: its absolute value, float32 (O, I)."""
        return weight_OI.float().abs()
