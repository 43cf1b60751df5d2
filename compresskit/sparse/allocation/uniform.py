"""Uniform: the same fraction of every layer."""

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
        """The same for all."""
        return dict.fromkeys(survey.sizes, survey.zero_fraction)
