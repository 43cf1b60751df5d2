"""Sensitivity: zeros go where the model was seen to lose least by them.

Each layer alone is pruned to several levels and the model's loss measured: the Kullback-Leibler divergence
from what it said before, in nats per token. Of all divisions of the zeros that one is taken whose losses, as
if they added up, are least.

Paper: layer by layer sensitivity, Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017,
https://arxiv.org/abs/1608.08710; the division is that of a separable convex problem, by marginal costs.

Shapes: none; layers are counted by their weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from compresskit.options import Within
from compresskit.sparse.base import Survey

MOST = 0.99
Curve = list[tuple[float, float]]
"""(zero fraction, nats per token), both rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The division of zeros that costs least, by what each layer alone was seen to cost.

    Attributes:
        spread: how far a layer's zero fraction may be from the target, up or down.
        levels: fractions that are tried in each layer, evenly spaced.
    """

    reads: ClassVar[str] = "costs"

    spread: Annotated[float, Within(0, 1, above=True)] = 0.2
    levels: Annotated[int, Within(3, 100)] = 5

    def fault(self, zero_fraction: float) -> str:
        """Any will do: levels stay between none and nearly all."""
        return "" if zero_fraction < MOST else f"less than {MOST}"

    def fractions(self, survey: Survey) -> Mapping[str, float]:
        """Measure, then hand out zeros where they cost least until there are enough.

        Args:
            survey: whose costs are measured once for each layer and level.

        Returns:
            Layer -> zero fraction; their mean, weighted by weights, is the target.
        """
        low = max(0.0, survey.zero_fraction - self.spread)
        high = min(MOST, survey.zero_fraction + self.spread)
        tried = [low + (high - low) * i / (self.levels - 1) for i in range(self.levels)]
        costs = survey.cost({layer: [level for level in tried if level > 0] for layer in survey.sizes})
        curves = {n: hull([(level, costs[n].get(level, 0.0)) for level in tried]) for n in survey.sizes}
        weights = {layer: rows * inputs for layer, (rows, inputs) in survey.sizes.items()}
        return cheapest(curves, weights, survey.zero_fraction * sum(weights.values()))


def hull(curve: Sequence[tuple[float, float]]) -> Curve:
    """The lower convex hull of a cost curve, from its first to its last point."""
    kept: Curve = []
    for x, y in curve:
        while len(kept) > 1:
            (x0, y0), (x1, y1) = kept[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            kept.pop()
        kept.append((x, y))
    return kept


def cheapest(curves: Mapping[str, Curve], weights: Mapping[str, int], zeros: float) -> dict[str, float]:
    """The fractions of least total cost that make ``zeros`` zeros.

    Args:
        curves: layer -> a convex curve.
        weights: layer -> how many it has.
        zeros: between what the first and the last points of the curves come to.
    """
    found = {layer: curve[0][0] for layer, curve in curves.items()}
    still = zeros - sum(found[layer] * count for layer, count in weights.items())
    queue: list[tuple[float, str, int]] = []

    def offer(layer: str, at: int) -> None:
        if at < len(curves[layer]):
            (x0, y0), (x1, y1) = curves[layer][at - 1 : at + 1]
            heapq.heappush(queue, ((y1 - y0) / ((x1 - x0) * weights[layer]), layer, at))

    for layer in curves:
        offer(layer, 1)
    while queue and still > 0:
        _, layer, at = heapq.heappop(queue)
        step = min((curves[layer][at][0] - found[layer]) * weights[layer], still)
        found[layer] += step / weights[layer]
        still -= step
        offer(layer, at + 1)
    return found
