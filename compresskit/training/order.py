"""Which rows each optimiser step sees: a function of the seed alone, the same on one process and on many.

Rows of different lengths are divided among micro-batches and ranks so that little is padded and all ranks
have about as many tokens; which rows a step sees, and so its loss, stays the same. Packed rows are of equal
length: how many of their tokens are supervised changes no computation, so they keep their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from compresskit.data.examples import pad_stack
from compresskit.training.objective import supervised_tokens
from compresskit.training.sentences import is_of_sentences


class Rows(Sized, Protocol):
    """A map-style data set of {"input_ids", "labels", "position_ids"}, each int64 (T,); or of sentences, see
    ``compresskit.data.examples``.

    Where rows are of different lengths it has ``lengths``, the tokens of each. A row is the same whenever it
    is asked for: a run that goes on, and other ranks, know the data by that.
    """

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


LOOKED_AT = 64
EXCHANGES = 64
"""Of rows between ranks in one step, at most: each costs what the square of a rank's micro-batches does."""
FED = ("input_ids", "position_ids", "attention_mask", "token_type_ids", "labels")
"""What of a batch a forward is given."""
Collate = Callable[[list[Mapping[str, Tensor]]], dict[str, Tensor]]
"""Rows to a batch."""


@runtime_checkable
class Mixed(Sized, Protocol):
    """Rows of several sources, which are shuffled source by source so that their shares stay as they are.

    An epoch has as many rows as all sources together.
    """

    def shuffled(self, epoch: int, seed: int) -> Tensor:
        """The number of the row that each item of a pass is."""
        ...

    def row(self, number: int) -> Mapping[str, Tensor]:
        """The row of that number."""
        ...


class Numbered:
    """All rows of several sources by their numbers, each once, whatever the shares of the sources are."""

    def __init__(self, rows: Mixed) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return self._rows.row(index)


class Ordered(Dataset[Mapping[str, Tensor]]):
    """``rows`` in the order of training: pass after pass, each shuffled anew, exactly ``steps`` batches.

    Consecutive items belong to one step, so ranks and accumulation may divide a step as they like, and a
    restart at step s begins at item s * batch_size.

    Args:
        rows: of equal length, or with ``lengths``.
        steps: of the optimiser.
        batch_size: rows of a step.
        seed: of the order.
        micro_batch_size: rows that one rank passes at once; they lie together.
        ranks: micro-batches go to them in turn.
    """

    def __init__(
        self, rows: Rows, *, steps: int, batch_size: int, seed: int, micro_batch_size: int = 1, ranks: int = 1
    ) -> None:
        self._rows, self._seed, self._batch_size = rows, seed, batch_size
        self._mixed = rows if isinstance(rows, Mixed) else None
        self._micro_batch_size, self._ranks = micro_batch_size, ranks
        self._items = steps * batch_size
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)
        self._step, self._places = -1, [0]
        self._lengths: Sequence[int] | None = getattr(rows, "lengths", None)

    def __len__(self) -> int:
        return self._items

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        if not 0 <= index < self._items:
            raise IndexError(index)
        if self._lengths is None:
            number = self._number(index)
        else:
            number = self._balanced(*divmod(index, self._batch_size))
        return self._rows[number] if self._mixed is None else self._mixed.row(number)

    def _number(self, index: int) -> int:
        """Which row an item is before steps are divided."""
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            if self._mixed is not None:
                self._permutation = self._mixed.shuffled(epoch, self._seed)
            else:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                self._permutation = torch.randperm(len(self._rows), generator=generator)
            self._epoch = epoch
        return int(self._permutation[place])

    def _balanced(self, step: int, place: int) -> int:
        """Which row stands at ``place`` of a step."""
        if step != self._step:
            first, lengths = step * self._batch_size, cast(Sequence[int], self._lengths)
            numbers = [self._number(first + i) for i in range(self._batch_size)]
            order = balanced([int(lengths[n]) for n in numbers], self._micro_batch_size, self._ranks)
            self._places, self._step = [numbers[i] for i in order], step
        return self._places[place]


def balanced(lengths: Sequence[int], micro_batch_size: int, ranks: int) -> list[int]:
    """An order of the rows of one step in which micro-batches pad little and ranks have alike much to do.

    The longest rows share a micro-batch, then the next longest; each round of micro-batches, one a rank, is
    of neighbours, and in it the rank with the fewest padded tokens so far gets the longest. Then the rank
    with most tokens and the one with fewest exchange rows or whole micro-batches as long as that makes the
    longest rank's step shorter.

    Args:
        lengths: tokens of each row, whole rounds of them.
        micro_batch_size: rows that one rank passes at once.
        ranks: micro-batch j goes to rank j modulo ``ranks``.

    Returns:
        Indices into ``lengths``, each once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    parts = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    padded = [0] * ranks
    given: list[list[list[int]]] = [[] for _ in range(ranks)]
    for first in range(0, len(parts), ranks):
        # Parts are longest first: the least loaded rank takes the first of them.
        by_load = sorted(range(ranks), key=lambda rank: (padded[rank], rank))
        for rank, part in zip(by_load, parts[first : first + ranks], strict=True):
            padded[rank] += _cost(part, lengths)
            given[rank].append(part)
    for _ in range(EXCHANGES if ranks > 1 else 0):
        if not _levelled(given, padded, lengths):
            break
    return [row for round_ in zip(*given, strict=True) for part in round_ for row in part]


def _cost(part: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a micro-batch, padding included."""
    return len(part) * max(lengths[row] for row in part)


def _levelled(given: list[list[list[int]]], padded: list[int], lengths: Sequence[int]) -> bool:
    """Make the longest rank's step shorter by one exchange with the shortest; False where none does."""
    most, least = padded.index(max(padded)), padded.index(min(padded))
    best: tuple[int, int, int, tuple[list[int], list[int]]] = padded[most], 0, 0, ([], [])
    for i, mine in enumerate(given[most]):
        for j, theirs in enumerate(given[least]):
            before = _cost(mine, lengths), _cost(theirs, lengths)
            for new in ((theirs, mine), _swapped(mine, theirs, lengths)):
                after = _cost(new[0], lengths), _cost(new[1], lengths)
                longer = max(padded[most] + after[0] - before[0], padded[least] + after[1] - before[1])
                if longer < best[0]:
                    best = longer, i, j, new
    _, i, j, new = best
    if not new[0]:
        return False
    for rank, at, part in ((most, i, new[0]), (least, j, new[1])):
        padded[rank] += _cost(part, lengths) - _cost(given[rank][at], lengths)
        given[rank][at] = part
    return True


def _swapped(
    mine: Sequence[int], theirs: Sequence[int], lengths: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Both with the longest row of ``mine`` and the shortest of ``theirs`` in each other's place."""
    long, short = max(mine, key=lambda r: lengths[r]), min(theirs, key=lambda r: lengths[r])
    return [short if r == long else r for r in mine], [long if r == short else r for r in theirs]


def stack(rows: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length as a batch, (B, T) each."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def collating(rows: Rows, *, sentences: bool) -> Collate:
    """How ``rows`` become a batch: padded, where they are sentences."""
    return partial(pad_stack, pad_id=getattr(rows, "pad_id", 0)) if sentences else stack


def mean_tokens(rows: Rows) -> float:
    """Of a row, which the first few tell."""
    some = [len(rows[i]["input_ids"]) for i in range(min(LOOKED_AT, len(rows)))]
    return sum(some) / len(some)


def supervised(batch: Mapping[str, Tensor]) -> int:
    """What a loss is divided by: supervised tokens of a batch of packed rows, or its sentences."""
    return len(batch["input_ids"]) if is_of_sentences(batch) else supervised_tokens(batch["labels"])


def digest_of(rows: Rows) -> str:
    """SHA-256 of some rows, spread over all: other data of as many rows seldom has the same."""
    digest, count = hashlib.sha256(), len(rows)
    for index in sorted({i * count // LOOKED_AT for i in range(LOOKED_AT)} if count else ()):
        row = rows[index]
        for name in (name for name in (*FED, "label") if name in row):
            digest.update(f"{name} {torch.as_tensor(row[name]).tolist()}\n".encode())
    return digest.hexdigest()
