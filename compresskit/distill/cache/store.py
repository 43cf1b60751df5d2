"""The folder of one cache: what it was made of, its parts, and an index of rows.

``facts.json`` says what decides the contents; ``index.npy`` (7, R) has, for each row in the order of hashes,
both halves of its hash, its part, first token and number of tokens there, first entry and number of entries;
``report.json``, written last, has names and sizes of the parts and how faithful the cache is.

Shapes: R = rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from safetensors import safe_open

from compresskit.distill.cache.keep import Columns, joined
from compresskit.distill.cache.parts import (
    checksum,
    damaged,
    file_checksum,
    partial_of,
    require_sound,
    unwritable,
    write_whole,
)
from compresskit.errors import DataError, Fault
from compresskit.progress import Progress, say

FACTS, INDEX, REPORT, LOCK = "facts.json", "index.npy", "report.json", ".lock"
LARGE_BYTES = 1 << 32
"""From which checking all parts shows its progress."""
BRIEF_S = 1.0
"""Seconds for which a lock is waited for without a word: other ranks write a few facts under it, too."""
FIELDS = 7
FIRST, SECOND, PART, TOKEN, TOKENS, ENTRY, ENTRIES = range(FIELDS)


class Store:
    """A whole cache, open for reading.

    Args:
        folder: where it lies.
        report: of :func:`read_report`.
        entry_columns: of its ``Keep``.
    """

    def __init__(self, folder: Path, report: Mapping[str, Any], entry_columns: Sequence[str]) -> None:
        self.folder, self.report = folder, report
        self._entry_columns = entry_columns
        self._index: npt.NDArray[np.uint64] = np.load(folder / INDEX, mmap_mode="r")

    @cached_property
    def _parts(self) -> list[Any]:
        return [safe_open(self.folder / name, "pt") for name in self.report["parts"]]  # type: ignore[no-untyped-call]

    def read(self, hash_B2: npt.NDArray[np.uint64]) -> Columns:
        """The columns of these rows, one below the other.

        Raises:
            DataError: a row is not in the cache.
        """
        if not len(hash_B2):
            return {name: self._parts[0].get_slice(name)[:0] for name in self._columns}
        return joined([self._row(first, second) for first, second in hash_B2])

    def _row(self, first: np.uint64, second: np.uint64) -> Columns:
        low, high = (int(np.searchsorted(self._index[FIRST], first, side)) for side in ("left", "right"))
        found = [at for at in range(low, high) if self._index[SECOND, at] == second]
        if not found:
            rows = self._index.shape[1]
            raise DataError(
                Fault(
                    f"teacher cache {self.folder}",
                    f"each row of the batch among its {rows:,} rows",
                    f"a row that the teacher was not asked about (hash {int(first):016x}{int(second):016x})",
                    "Train and evaluate on the rows the cache was made of, or make another cache.",
                )
            )
        part, token, tokens, entry, entries = self._index[PART:, found[0]].tolist()
        file = self._parts[part]
        lines = {name: (entry, entries) for name in self._entry_columns}
        return {
            name: file.get_slice(name)[begin : begin + count]
            for name in self._columns
            for begin, count in [lines.get(name, (token, tokens))]
        }

    @cached_property
    def _columns(self) -> list[str]:
        names: list[str] = self._parts[0].keys()
        return [name for name in names if name not in ("hashes", "tokens", "lines")]


def agree(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make ``folder`` that of a cache of ``facts``, or see that it is one already.

    Raises:
        DataError: it is the cache of other facts, which are named, or something else.
        OutputError: it cannot be written.
    """
    path = folder / FACTS
    if not path.is_file():
        _begin(folder, facts)
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        cure = f"Nothing tells what the rest of {folder} is of: delete the folder, and it is made again."
        raise damaged(path, str(error), cure) from error
    if facts != theirs:
        both = [name for name in facts if name in theirs and facts[name] != theirs[name]]
        differ = both or sorted(facts.keys() ^ theirs.keys())
        expected = ", ".join(f"{name} {facts.get(name)}" for name in differ)
        got = ", ".join(f"{name} {theirs.get(name)}" for name in differ)
        cure = "Name another folder, or leave dir out, or train as the cache was made."
        raise DataError(Fault(f"teacher cache {folder}", expected, got, cure))


def _begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` into ``folder``, unless another process does so first; ranks come here together."""
    path = folder / FACTS
    ours = {LOCK, partial_of(path).name}  # what a process leaves that is killed right here
    others = folder.is_dir() and any(found.name not in ours for found in folder.iterdir())
    if others and not path.is_file():
        cure = "Name an empty folder, or one that does not exist yet."
        raise DataError(Fault(f"teacher cache {folder}", f"{FACTS} or an empty folder", "other files", cure))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, "a teacher cache", str(error)) from error
    with locked(folder):
        if not path.is_file():
            write_whole(path, (json.dumps(facts, indent=1) + "\n").encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the only right to write into ``folder``; it ends with the process, however that ends."""
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=BRIEF_S)
        except Timeout:
            say(f"Another process fills the teacher cache {folder}; waiting for it.")
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
        raise unwritable(folder, "a teacher cache", str(error)) from error
    try:
        yield
    finally:
        lock.release()


def read_report(folder: Path) -> Mapping[str, Any] | None:
    """What the finished cache in ``folder`` says of itself; None where something is still to be made.

    Raises:
        DataError: its index is damaged, or the report itself.
    """
    path = folder / REPORT
    if not path.is_file() or not (folder / INDEX).is_file():
        return None
    try:
        report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        parts, index = report["parts"], report["index"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from error
    if file_checksum(folder / INDEX) != index:
        raise damaged(folder / INDEX, "another")
    return report if all((folder / name).is_file() for name in parts) else None


def check_parts(folder: Path, report: Mapping[str, Any]) -> None:
    """Read all parts of a finished cache once.

    Raises:
        DataError: one is damaged or cut short.
    """
    total = sum(report["parts"].values())
    bar = Progress("Checking the teacher's cache", total, unit="bytes") if total >= LARGE_BYTES else None
    for name in report["parts"]:
        require_sound(folder / name, bar.advance if bar else lambda count: None)


def write_index(folder: Path, parts: Sequence[Path]) -> str:
    """Write the index of these parts, whose rows are in the order of their hashes; returns its checksum."""
    columns = []
    for number, path in enumerate(parts):
        with safe_open(path, "np") as file:  # type: ignore[no-untyped-call]
            hashes, tokens, lines = (file.get_tensor(name) for name in ("hashes", "tokens", "lines"))
        columns.append(
            np.stack(
                [
                    *hashes.view(np.uint64).T,
                    np.full(len(tokens), number, dtype=np.uint64),
                    _begins(tokens),
                    tokens.astype(np.uint64),
                    _begins(lines),
                    lines.astype(np.uint64),
                ]
            )
        )
    file = BytesIO()
    np.save(file, np.concatenate(columns, axis=1))
    write_whole(folder / INDEX, file.getvalue())
    return checksum(file.getvalue())


def _begins(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    return (np.cumsum(counts) - counts).astype(np.uint64)
