"""Rows for a teacher, and what reads its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compresskit.distill.cache.provider import Cached

VOCABULARY = 258


class Some:
    """Rows of which some tokens are not supervised; one has none at all, and two are the same."""

    def __init__(self, rows: int = 24, width: int = 12, seed: int = 0) -> None:
        self.ids = torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(seed))
        self.ids[1] = self.ids[0]
        self.labels = self.ids.clone()
        for row in range(2, rows):
            self.labels[row, : 1 + row % 5] = -100
        self.labels[3] = -100
        self.positions = torch.arange(width).repeat(rows, 1)
        self.positions[5:, 7:] -= 7

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids[index],
            "labels": self.labels[index],
            "position_ids": self.positions[index],
        }


def cached(teacher: Path, **changes: Any) -> Cached:
    return Cached(directory=str(teacher), vocabulary=VOCABULARY, **changes)
