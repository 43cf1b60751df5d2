"""Fluctuation: a unit is worth how much what it hands on varies, weighted by how strongly it is read.

What hardly varies is nearly a constant, and a constant can stand in a bias (``compensate``).

Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), AAAI 2024,
https://arxiv.org/abs/2312.11983. Blocks are worth what :mod:`compresskit.sparse.structured.activation` says.

Shapes: L = blocks, U = units of a width, D = hidden size, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compresskit.calibration.statistics import LayerStats
from compresskit.sparse.structured.base import Scores, Subject
from compresskit.sparse.structured.dense import walk_dense
from compresskit.sparse.structured.tally import Tally

MEAN, SQUARE = "input_mean", "input_sq_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class FluctuationImportance:
    """The variance of each input times the squared norm of its weights, over layers in blocks."""

    reads_data: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = False

    def measure(self, subject: Subject) -> Scores:
        """Run the rows through the dense model, one block in memory.

        Args:
            subject: with rows.

        Returns:
            Scores of blocks and units.

        Raises:
            DataError: there are no rows, or all is padding.
            ModelError: weights cannot be read, or the model's blocks cannot run one by one.
        """
        model = subject.model
        tally = Tally(model.anatomy, subject.dimensions)

        def take(stats: Mapping[str, LayerStats]) -> None:
            for layer, found in stats.items():
                inputs = model.anatomy.linears[layer].in_features
                for need in (MEAN, SQUARE):
                    found.require(need, inputs)
                assert found.input_variance_I is not None
                variance_I = found.input_variance_I.double().cpu()
                worth_I = variance_I * model.weight_OI(layer).double().square().sum(0)
                for kind in subject.dimensions.widths if subject.dimensions else ():
                    tally.add_inputs(kind, layer, worth_I)

        seen = walk_dense(subject, frozenset({MEAN, SQUARE}), take)
        return Scores(blocks_L=seen.influence_L, units=tally.units, num_tokens=seen.num_tokens)
