"""Activation: a unit is worth the mean absolute value it hands on; a block, how far it turns its input.

Paper: neurons, heads and channels: Muralidharan et al., "Compact Language Models via Pruning and Knowledge
Distillation" (Minitron), NeurIPS 2024, https://arxiv.org/abs/2407.14679. Blocks by block influence: Men et
al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
https://arxiv.org/abs/2403.03853.

Shapes: L = blocks, U = units of a width, D = hidden size, I = inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compresskit.calibration.statistics import LayerStats
from compresskit.sparse.structured.base import Scores, Subject
from compresskit.sparse.structured.dense import walk_dense
from compresskit.sparse.structured.tally import Tally

NEED = "input_abs_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationImportance:
    """What is loud stays. Of a head all outputs count; of a hidden channel, all layers in blocks.

    Hidden channels are measured where these layers read them: behind the norms. What reads them outside the
    blocks, such as the output layer, does not count.
    """

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
        tally = Tally(subject.model.anatomy, subject.dimensions)

        def take(stats: Mapping[str, LayerStats]) -> None:
            for (kind, layer), found in distinct(subject, stats).items():
                inputs = subject.model.anatomy.linears[layer].in_features
                tally.add_inputs(kind, layer, found.require(NEED, inputs))

        seen = walk_dense(subject, frozenset({NEED}), take)
        return Scores(blocks_L=seen.influence_L, units=tally.units, num_tokens=seen.num_tokens)


def distinct(subject: Subject, stats: Mapping[str, LayerStats]) -> dict[tuple[str, str], LayerStats]:
    """The statistics of a block's readers of each width, by kind and layer; one of those fed the same."""
    found: dict[tuple[str, str], LayerStats] = {}
    for kind, dimension in subject.dimensions.widths.items() if subject.dimensions else ():
        seen: list[object] = []
        for layer, layer_stats in stats.items():
            inside = layer.removeprefix(subject.model.anatomy.block_of(layer) or "")
            if inside in dimension.readers and not any(s is layer_stats.shared for s in seen):
                seen.append(layer_stats.shared)
                found[kind, layer] = layer_stats
    return found
