"""A data source as a stream of documents, split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from compresskit.data.spec import STDLIB, DataSpec
from compresskit.data.stdlib import stdlib_split
from compresskit.errors import DataError, Fault

SPLITS = ("train", "validation", "all")


@dataclass(frozen=True, slots=True)
class Corpus:
    """One data source.

    Attributes:
        spec: what was asked for.
        files: the files that are read, in order.
    """

    spec: DataSpec
    files: tuple[Path, ...]

    def documents(self, split: str = "train") -> Iterator[str]:
        """The text of each document of ``split``, in a fixed order, read as a stream."""
        pairs = stdlib_split(split, self.spec.validation_fraction)
        return islice((path.read_text(encoding="utf-8") for _, path in pairs), self.spec.documents)

    def fingerprint(self) -> str:
        """A hash of everything that decides the documents, contents of the files included."""
        digest = hashlib.sha256(repr(self.spec).encode())
        for path in self.files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def open_corpus(spec: DataSpec) -> Corpus:
    """Find the source that ``spec`` names.

    Raises:
        DataError: there is no such source, or it is of no known kind.
    """
    if spec.source != STDLIB:
        raise DataError(Fault("data", "stdlib:", repr(spec.source), "Use stdlib: ."))
    return Corpus(spec, tuple(p for _, p in stdlib_split("all", 0.0)))


def documents(spec: DataSpec, split: str = "train") -> Iterator[str]:
    """The text of each document of ``split`` of ``spec``; see :meth:`Corpus.documents`."""
    return open_corpus(spec).documents(split)


def check(spec: DataSpec, where: str) -> list[Fault]:
    """What is wrong with ``spec``, found cheaply; ``where`` is its place in the recipe."""
    try:
        next(open_corpus(spec).documents("all"))
    except DataError as error:
        return [f if isinstance(f, Fault) else Fault(where, "data", str(f), "") for f in error.faults]
    return []
