"""Rows for ranks some of which compute together: those see the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset


class Items(Protocol):
    """A map-style data set whose consecutive items, so many each, are the micro-batches of ranks in turn."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


class Repeated(Dataset[Mapping[str, Tensor]]):
    """``rows``, each micro-batch so many times in a row as ranks are to see it.

    Args:
        rows: whole micro-batches.
        micro_batch_size: rows of each.
        times: neighbouring ranks that see the same.
    """

    def __init__(self, rows: Items, *, micro_batch_size: int, times: int) -> None:
        self._rows, self._size, self._times = rows, micro_batch_size, times

    def __len__(self) -> int:
        return len(self._rows) * self._times

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch, place = divmod(index, self._size)
        return self._rows[batch // self._times * self._size + place]
