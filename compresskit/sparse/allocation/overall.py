"""Global: the lowest scores of the whole model, whichever layers they are in; of weights, or of blocks.

Paper: for magnitudes, Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
Networks", NeurIPS 2015, https://arxiv.org/abs/1506.02626; beside layer by layer, Blalock et al., "What is
the State of Neural Network Pruning?", MLSys 2020, https://arxiv.org/abs/2003.03033.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.options import Within
from compresskit.sparse.base import Survey

SHIFT = 15
"""Bits of a float32 that are not looked at: scores are told apart to 0.4%."""
BINS = 1 << (31 - SHIFT)
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Overall:
    """One threshold for the scores of all layers; each gets as many zeros as it has scores below.

    Attributes:
        most: zero fraction that no layer gets more than.
    """

    reads: ClassVar[str] = "scores"

    most: Annotated[float, Within(0, 1, above=True)] = 0.95

    def fault(self, zero_fraction: float) -> str:
        """No more than any layer may have."""
        return "" if zero_fraction <= self.most else f"at most {self.most:.10g}, which is most of global"

    def fractions(self, survey: Survey) -> Mapping[str, float]:
        """Find the threshold.

        Args:
            survey: whose scores are gone through once, one layer at a time; of each only a histogram is kept.

        Returns:
            Layer -> zero fraction. Within a histogram's bin, zeros are divided in proportion.
        """
        counts = {layer: _histogram(survey.chosen_among(layer)) for layer in survey.sizes}
        free, wanted = dict(counts), survey.zero_fraction * sum(_total(count) for count in counts.values())
        found: dict[str, float] = {}
        while True:
            shares = _below(free, wanted) if free else {}
            full = [layer for layer, share in shares.items() if share > self.most + ROUNDING]
            if not full:
                return {layer: found.get(layer, shares.get(layer, 0.0)) for layer in survey.sizes}
            for layer in full:
                found[layer] = self.most
                wanted -= self.most * _total(free.pop(layer))


def _histogram(score: Tensor) -> Tensor:
    """How many scores, which are not negative, fall into each bin: int64 (:data:`BINS`,), on the CPU."""
    bits = score.float().contiguous().view(torch.int32).flatten() >> SHIFT
    return torch.bincount(bits, minlength=BINS).cpu()


def _total(count: Tensor) -> int:
    return int(count.sum())


def _below(counts: Mapping[str, Tensor], wanted: float) -> dict[str, float]:
    """The part of each layer's scores below the threshold that leaves ``wanted`` of all below it."""
    summed = torch.stack(list(counts.values())).sum(0).cumsum(0)
    at = int((summed < wanted).sum())
    under = int(summed[at - 1]) if at else 0
    part = (wanted - under) / max(int(summed[min(at, BINS - 1)]) - under, 1)
    return {
        layer: (float(count[:at].sum()) + part * float(count[min(at, BINS - 1)])) / _total(count)
        for layer, count in counts.items()
    }
