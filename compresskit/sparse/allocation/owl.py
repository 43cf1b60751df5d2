"""OWL: blocks with more outliers among their scores keep more of their weights.

Paper: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity", ICML 2024, https://arxiv.org/abs/2310.05175. An outlier is a weight whose score is more than so
many times the mean of its block's.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from compresskit.options import Within
from compresskit.sparse.base import Survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Owl:
    """All layers of a block get the same fraction, which falls as the part of its outliers rises.

    Attributes:
        outlier: how many times the mean score of a block makes an outlier.
        spread: half of how far the fractions of two blocks are apart at most.
    """

    reads: ClassVar[str] = "scores"

    outlier: Annotated[float, Within(1, above=True)] = 5.0
    spread: Annotated[float, Within(0, 0.5, above=True)] = 0.08

    def fault(self, zero_fraction: float) -> str:
        """The spread has to fit between none and all."""
        if self.spread < zero_fraction < 1 - self.spread:
            return ""
        return f"more than {self.spread:.10g} and less than {1 - self.spread:.10g}, the spread of owl"

    def fractions(self, survey: Survey) -> Mapping[str, float]:
        """Count outliers block by block, and spread the fractions as their shares are spread.

        Args:
            survey: whose scores are gone through twice, one layer at a time.

        Returns:
            Layer -> zero fraction; their mean, weighted by weights, is the target.
        """
        weights: dict[str | None, int] = {}
        sums: dict[str | None, float] = {}
        for layer, (rows, inputs) in survey.sizes.items():
            block = survey.blocks[layer]
            weights[block] = weights.get(block, 0) + rows * inputs
            sums[block] = sums.get(block, 0.0) + float(survey.score(layer).sum(dtype=torch.float64))
        share = dict.fromkeys(weights, 0.0)
        for layer in survey.sizes:
            block = survey.blocks[layer]
            least = self.outlier * sums[block] / weights[block]
            share[block] += int((survey.score(layer) > least).sum()) / weights[block]
        least, most = min(share.values()), max(share.values())
        if most == least:
            return dict.fromkeys(survey.sizes, survey.zero_fraction)
        kept = {block: 2 * self.spread * (value - least) / (most - least) for block, value in share.items()}
        mean = sum(kept[block] * weights[block] for block in kept) / sum(weights.values())
        return {n: survey.zero_fraction + mean - kept[survey.blocks[n]] for n in survey.sizes}
