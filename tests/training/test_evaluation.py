"""Which validation rows a rank reads: all together each of them once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compresskit.training.evaluation import Share


class Numbers:
    """Row i says i."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([index])}


@pytest.mark.parametrize(("count", "size", "ranks"), [(7, 2, 2), (6, 2, 2), (1, 4, 3), (5, 1, 4), (8, 4, 1)])
def test_every_row_counts_once_and_ranks_have_as_many_batches(count: int, size: int, ranks: int) -> None:
    def collate(rows: list[Any]) -> Any:
        return {"input_ids": torch.cat([row["input_ids"] for row in rows])}

    shares = [
        Share(Numbers(count), collate, size=size, rank=rank, ranks=ranks)  # type: ignore[arg-type]
        for rank in range(ranks)
    ]
    read = [list(share) for share in shares]
    assert {len(batches) for batches in read} == {len(shares[0])}
    counted = [batch["input_ids"] for batches in read for batch, counts in batches if counts]
    assert torch.cat(counted).sort().values.tolist() == list(range(count))
    assert max(map(len, counted)) <= size
