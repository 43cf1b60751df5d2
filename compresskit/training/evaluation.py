"""What an evaluation reads on each rank, and what evaluations before it found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from torch import Tensor

from compresskit.progress import Progress
from compresskit.training.order import Collate, Rows

LONG = 64
"""Batches from which an evaluation shows its progress."""


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's batches of the validation rows; every rank has as many, a missing one is filled.

    Attributes:
        rows: of the whole evaluation.
        collate: rows to a batch.
        size: rows of a batch.
        rank, ranks: whose share it is.
    """

    rows: Rows
    collate: Collate
    size: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        return -(-len(self._starts) // self.ranks)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Each batch, and whether it counts; one that only fills up does not."""
        own = self._starts[self.rank :: self.ranks]
        for start in own:
            rows = range(start, min(start + self.size, len(self.rows)))
            yield self.collate([self.rows[i] for i in rows]), True
        if len(own) < len(self):
            yield self.collate([self.rows[0]]), False

    @property
    def _starts(self) -> range:
        return range(0, len(self.rows), self.size)


def shown_progress(batches: int, *, shown: bool) -> Progress:
    """Progress of an evaluation, ``shown`` only where it takes a while."""
    stream = None if shown and batches >= LONG else _Silent()
    return Progress("Evaluating", batches, unit="batches", stream=stream)


def evaluation_at(history: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Validation loss after so many steps, as the trainer's log has it; None where there was no such."""
    return next((float(e["eval_loss"]) for e in history if "eval_loss" in e and e["step"] == step), None)


def is_owed(history: Sequence[Mapping[str, Any]], step: int, every: int) -> bool:
    """Whether an evaluation after ``step`` was due and did not come to its end: its teacher was lost then."""
    return every > 0 and step % every == 0 and evaluation_at(history, step) is None


def lowest_evaluation(history: Sequence[Mapping[str, Any]]) -> float:
    """The lowest validation loss in the trainer's log; infinity where there is none."""
    return min((float(e["eval_loss"]) for e in history if "eval_loss" in e), default=math.inf)


class _Silent(StringIO):
    """A stream that drops everything."""

    def write(self, text: str) -> int:
        return len(text)
