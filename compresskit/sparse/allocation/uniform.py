"""Uniform: the same fraction of every layer.

Paper: the choice of Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", ICML 2023, https://arxiv.org/abs/2301.00774, and of most since.

Shapes: none; nothing is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compresskit.sparse.base import Survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """The pattern as it is, for every layer."""

    reads: ClassVar[str] = "sizes"

    def fault(self, zero_fraction: float) -> str:
        """Any will do."""
        return ""

    def fractions(self, survey: Survey) -> Mapping[str, float]:
        """Give all the same.

        Args:
            survey: of which only the names and the target are read.

        Returns:
            Layer -> the target.
        """
        return dict.fromkeys(survey.sizes, survey.zero_fraction)
