"""Rows of several sources in given shares, so that every beginning of an epoch holds them in those shares.

Shapes: S = sources, E = rows of an epoch.

An epoch has as many rows as all sources together; the shares are of rows. Item j of a source stands at
(j + 1/2) / share, and the epoch is all items in that order: Webster's method of apportionment, by which
the first n rows hold n * share of a source to within (1 + S) / 2 rows. Training passes over the rows of each
source by itself: none is seen a second time before all of its source have been seen, across epochs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from compresskit.data.lines import bad
from compresskit.data.spec import DataSpec

if TYPE_CHECKING:
    from compresskit.data.pack import PackedRows


class MixedRows(Dataset[dict[str, Tensor]]):
    """A map-style data set over the packed rows of several sources; its items are theirs.

    In the order of indices the rows of a source are spread over it, or repeated in their order.

    Attributes:
        context_length: of every row.
        num_tokens: of all sources.
        num_documents: of all sources.
        warnings: those of the sources, and one that says what an epoch is.
    """

    def __init__(
        self,
        parts: Sequence[PackedRows],
        shares: Sequence[float],
        names: Sequence[str],
        rows: int | None = None,
    ) -> None:
        self.context_length = parts[0].context_length
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_documents = sum(part.num_documents for part in parts)
        self._parts = tuple(parts)
        sizes_S = np.array([len(part) for part in parts], dtype=np.int64)
        whole = int(sizes_S.sum())
        self._source_E = interleaved(shares, whole if rows is None else min(rows, whole))
        self._taken_S = np.bincount(self._source_E, minlength=len(parts))
        self._nth_E = _nth(self._source_E, len(parts))
        self._sizes_S, self._firsts_S = sizes_S, np.cumsum(sizes_S) - sizes_S
        told = [(name, note) for name, part in zip(names, parts, strict=True) for note in part.warnings]
        self.warnings = tuple(note if note.startswith(name) else f"{name}: {note}" for name, note in told)
        if rows is None:
            passes = self._taken_S / sizes_S
            said = ", ".join(
                f"{name} {share:.1%} of them, {often:.2g} times over"
                for name, share, often in zip(names, shares, passes, strict=True)
            )
            self.warnings += (f"An epoch is {whole} rows, as many as all sources have: {said}.",)

    def __len__(self) -> int:
        return len(self._source_E)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # Fewer rows than a source has are spread over it; more of them begin again.
        source, nth = int(self._source_E[index]), int(self._nth_E[index])
        size, taken = int(self._sizes_S[source]), int(self._taken_S[source])
        return self._parts[source][nth * size // taken if taken < size else nth % size]

    def shuffled(self, epoch: int, seed: int) -> Tensor:
        """Which row each item of a pass is (E,), int64, for :meth:`row`; decided by the arguments alone."""
        made_E = np.empty(len(self), dtype=np.int64)
        for source, (size, taken) in enumerate(zip(self._sizes_S, self._taken_S, strict=True)):
            rows = _shuffled(int(size), int(taken), epoch, (seed, source))
            made_E[self._source_E == source] = rows + self._firsts_S[source]
        return torch.from_numpy(made_E)

    def row(self, number: int) -> dict[str, Tensor]:
        """The row of that number, counted through all sources."""
        source = int(np.searchsorted(self._firsts_S, number, side="right")) - 1
        return self._parts[source][number - int(self._firsts_S[source])]


def interleaved(shares: Sequence[float], count: int) -> npt.NDArray[np.int16]:
    """Which source each of ``count`` rows is from (E,).

    Args:
        shares: of each source (S,), above 0, adding up to 1.
        count: E.
    """
    # Of a source no more than its share and S rows can stand among the first E.
    most = [int(share * count) + len(shares) + 1 for share in shares]
    source = np.repeat(np.arange(len(shares), dtype=np.int16), most)
    places = np.concatenate([(np.arange(n) + 0.5) / share for n, share in zip(most, shares, strict=True)])
    return source[np.argsort(places, kind="stable")][:count]


def _nth(source_E: npt.NDArray[np.int16], sources: int) -> npt.NDArray[np.int64]:
    """Of each row, how many of its source came before it (E,)."""
    nth_E = np.empty(len(source_E), dtype=np.int64)
    for source in range(sources):
        mine = source_E == source
        nth_E[mine] = np.arange(int(mine.sum()))
    return nth_E


def _shuffled(size: int, taken: int, epoch: int, seed: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The rows of one source that an epoch takes, in order (taken,): passes over all of its ``size`` rows."""
    first = epoch * taken
    parts = []
    for number in range(first // size, -(-(first + taken) // size)):
        generator = torch.Generator().manual_seed((seed[0] * 1_000_003 + number) * 1_009 + seed[1])
        order = torch.randperm(size, generator=generator).numpy()
        begin = number * size
        parts.append(order[max(first - begin, 0) : first + taken - begin])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def mixed(parts: Sequence[PackedRows], spec: DataSpec, rows: int | None) -> MixedRows:
    """The rows of the sources of ``spec`` in its shares.

    Args:
        parts: packed rows of each.
        spec: with sources.
        rows: at most so many; None is an epoch.

    Raises:
        DataError: a source does not fill one row.
    """
    length = parts[0].context_length
    for share, part in zip(spec.sources, parts, strict=True):
        if (tokens := int(part[0]["input_ids"].shape[0])) < length:
            cure = "Lower context_length, or leave that source out."
            raise bad(share.source, f"text for one row of {length} tokens", f"{tokens} tokens", cure)
    return MixedRows(parts, spec.shares, [share.source for share in spec.sources], rows)
