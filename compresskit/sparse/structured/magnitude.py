"""Magnitude: a unit is worth the sum of squares of all weights that belong to it. Reads no data.

Paper: the joint magnitude of everything that goes together: Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900. Blocks evenly spaced, the first and the last kept:
Sanh et al., "DistilBERT", 2019, https://arxiv.org/abs/1910.01108.

Shapes: L = blocks, U = units of a width, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compresskit.sparse.structured.base import Scores, Subject
from compresskit.sparse.structured.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeImportance:
    """The largest weights stay; biases and norms do not count."""

    reads_data: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = False

    def measure(self, subject: Subject) -> Scores:
        """Read every weight once, one at a time.

        Args:
            subject: rows are not looked at.

        Returns:
            Scores of units; none of blocks.
        """
        tally = Tally(subject.model.anatomy, subject.dimensions)
        for name in subject.model.names() if subject.dimensions else ():
            if len(subject.model.shape(name)) > 1:
                tally.add_parameter(name, subject.model.tensor(name).float().square_())
        return Scores(units=tally.units)
