"""Which rows each optimiser step sees: a function of the seed alone, the same on one process and on many."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Rows(Sized, Protocol):
    """A map-style data set of {"input_ids", "labels", "position_ids"}, each int64 (T,)."""

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


class Ordered(Dataset[Mapping[str, Tensor]]):
    """``rows`` in the order of training: pass after pass, each shuffled anew, exactly ``steps`` batches.

    Consecutive items belong to one step, so ranks and accumulation may divide a step as they like, and a
    restart at step s begins at item s * batch_size.
    """

    def __init__(self, rows: Rows, *, steps: int, batch_size: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._items = steps * batch_size
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._items

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        if not 0 <= index < self._items:
            raise IndexError(index)
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(len(self._rows), generator=generator)
            self._epoch = epoch
        return self._rows[int(self._permutation[place])]


def stack(rows: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length as a batch, (B, T) each."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
