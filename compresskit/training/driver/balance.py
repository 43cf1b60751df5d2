"""Which blocks of a model make a stage of a pipeline. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from compresskit.errors import Fault, PlanError


def balanced_stages(
    costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0
) -> tuple[range, ...]:
    """Consecutive blocks such that the dearest stage is as cheap as can be; of those the first found.

    Args:
        costs: of each block, such as the weights that each token is multiplied by.
        stages: how many; each has one block at least.
        first: what the first stage has to do besides: the embedding.
        last: what the last stage has to do besides: the output projection and the loss.

    Returns:
        The blocks of each stage, in order.

    Raises:
        PlanError: there are fewer blocks than stages.
    """
    blocks = len(costs)
    if not 1 <= stages <= blocks:
        cure = "Lower pipeline_stages."
        raise PlanError(Fault("pipeline_stages", f"at most {blocks}, a block each", str(stages), cure))
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def own(start: int, end: int, number: int) -> float:
        extra = (first if number == 0 else 0.0) + (last if number == stages - 1 else 0.0)
        return total[end] - total[start] + extra

    # dearest[end]: of the best division of blocks[:end] into the stages so far, and where its last begins.
    dearest = [own(0, end, 0) if end else float("inf") for end in range(blocks + 1)]
    begins: list[list[int]] = []
    for number in range(1, stages):
        begin, now = [0] * (blocks + 1), [float("inf")] * (blocks + 1)
        for end in range(number + 1, blocks + 1):
            for start in range(number, end):
                cost = max(dearest[start], own(start, end, number))
                if cost < now[end]:
                    now[end], begin[end] = cost, start
        dearest = now
        begins.append(begin)
    edges = [blocks]
    for begin in reversed(begins):
        edges.append(begin[edges[-1]])
    edges = [0, *reversed(edges)]
    return tuple(range(a, b) for a, b in pairwise(edges))
