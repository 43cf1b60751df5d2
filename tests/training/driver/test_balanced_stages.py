"""Stages as even as can be, beside all divisions tried one by one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from compresskit.errors import PlanError
from compresskit.training.driver.balance import balanced_stages


def dearest(costs: list[float], stages: tuple[range, ...], first: float, last: float) -> float:
    sums = [sum(costs[i] for i in own) for own in stages]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_division_has_a_cheaper_dearest_stage(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 9, (7,), generator=generator).tolist()
    first, last = torch.randint(0, 12, (2,), generator=generator).tolist()
    stages = balanced_stages(costs, count, first=first, last=last)
    assert [i for own in stages for i in own] == list(range(7))
    assert len(stages) == count
    assert all(stages)
    best = min(
        dearest(costs, tuple(map(range, (0, *cuts), (*cuts, 7))), first, last)
        for cuts in combinations(range(1, 7), count - 1)
    )
    assert dearest(costs, stages, first, last) == best


def test_a_dear_head_leaves_its_stage_fewer_blocks() -> None:
    assert balanced_stages([1.0] * 8, 2) == (range(4), range(4, 8))
    assert balanced_stages([1.0] * 8, 2, last=4.0) == (range(6), range(6, 8))


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match="at most 2"):
        balanced_stages([1.0, 1.0], 3)
