"""Ranks that compute together are fed the same rows, and groups of them what ranks alone would be."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from compresskit.training.mesh.rows import Repeated


class Numbers:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {"input_ids": torch.tensor([index])}


def fed(rows: Numbers | Repeated, size: int, rank: int, ranks: int) -> list[list[int]]:
    """The micro-batches that come to ``rank`` where they go to ranks in turn."""
    batches = [range(start, start + size) for start in range(0, len(rows), size)]
    return [[int(rows[i]["input_ids"]) for i in batch] for batch in batches[rank::ranks]]


@pytest.mark.parametrize(("size", "times", "groups"), [(3, 2, 2), (1, 4, 1), (4, 3, 2), (2, 2, 3)])
def test_each_group_of_ranks_is_fed_as_one_rank(size: int, times: int, groups: int) -> None:
    repeated = Repeated(Numbers(), micro_batch_size=size, times=times)
    for rank in range(groups * times):
        mine = fed(repeated, size, rank, groups * times)
        assert mine == fed(Numbers(), size, rank // times, groups)


def test_it_ends() -> None:
    repeated = Repeated(Numbers(), micro_batch_size=3, times=2)
    assert len(list(repeated)) == len(repeated) == 48
    with pytest.raises(IndexError):
        repeated[-1]
