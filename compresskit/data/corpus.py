"""A data source as a stream of documents, split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from compresskit.data.columns import text_column
from compresskit.data.hub import hub_columns, hub_documents, hub_identity, hub_splits
from compresskit.data.lines import bad, file_sha256, lines
from compresskit.data.readers import kind_of, read_file
from compresskit.data.source import Source, find_source
from compresskit.data.spec import DataSpec
from compresskit.data.stdlib import held_out, stdlib_split
from compresskit.errors import DataError, Fault

SPLITS = ("train", "validation", "all")
CHECKED_CHARACTERS = 1 << 25
CHECKED_FAULTS = 10
GIVE_TEXT = "Give a source with text."


@dataclass(frozen=True, slots=True)
class Corpus:
    """One data source.

    Attributes:
        spec: what was asked for.
        source: what its name stands for.
    """

    spec: DataSpec
    source: Source

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read, in order; none for a data set of the hub."""
        return self.source.files

    def documents(self, split: str = "train", notes: list[str] | None = None) -> Iterator[str]:
        """The text of each document of ``split``, in a fixed order, read as a stream.

        A source with a validation split of its own is taken at its word. Of any other, documents are
        held out by a hash of their text (of the relative path for ``stdlib:``); the first one is always
        training and the second always validation, so that even a tiny source has both.

        Args:
            split: ``train``, ``validation`` or ``all``; ``DataSpec.documents`` limits each by itself.
            notes: gets sentences about what was left out, once the stream has ended.

        Raises:
            DataError: unreadable, malformed, or no text in it; also while the stream is read.
        """
        if split not in SPLITS:
            raise bad("split", " or ".join(SPLITS), repr(split), "Name one of them.")
        if self.spec.documents is not None and self.spec.documents < 1:
            raise bad("documents", "at least 1", str(self.spec.documents), "Raise it, or leave it out.")
        return islice(self._texts(split, [] if notes is None else notes), self.spec.documents)

    def _texts(self, split: str, notes: list[str]) -> Iterator[str]:
        blank = rows = texts = 0
        for place, text, wanted in self._marked(split):
            rows += 1
            if not text.strip():
                blank += 1
                continue
            texts += 1
            try:
                key = text.encode()
            except UnicodeEncodeError as error:
                got = f"a lone surrogate at character {error.start}"
                raise bad(place, "text of Unicode characters", got, "Mend the text of that row.") from error
            if wanted is None:
                held = texts == 2 or (texts > 2 and held_out(key, self.spec.validation_fraction))
                wanted = held == (split == "validation")
            if wanted:
                yield text
        if texts == 0:
            got = f"{rows} blank documents" if rows else "an empty source"
            raise bad(self.spec.source, "at least one document with text", got, GIVE_TEXT)
        if blank:
            notes.append(f"{self.spec.source}: {blank} of {rows} documents are blank and were left out.")
        if self.source.left_out:
            names = ", ".join(path.name for path in self.source.left_out[:5])
            notes.append(f"{self.spec.source}: files of a test split were left out: {names}.")

    def _marked(self, split: str) -> Iterator[tuple[str, str, bool | None]]:
        """Place, text and whether the document is in ``split``; None where its hash is to decide."""
        column = self.spec.column
        if self.source.kind == "stdlib":
            for name, path in stdlib_split(split, self.spec.validation_fraction):
                yield name, "".join(text for _, text in lines(path)), True
            return
        if self.source.kind == "hub":
            for part, decided in _parts(split, "validation" in hub_splits(self.source.name)):
                for place, text in hub_documents(self.source.name, part, column):
                    yield place, text, decided
            return
        own = bool(self.source.validation)
        files = {"train": self.source.train, "validation": self.source.validation}
        for part, decided in _parts(split, own):
            for path in files[part]:
                for place, text in read_file(path, column):
                    yield place, text, decided

    def fingerprint(self) -> str:
        """A hash of everything that decides the documents and their split, but not of where files lie."""
        spec = self.spec
        facts = [spec.column, spec.documents, spec.validation_fraction, self.source.kind]
        if self.source.kind == "hub":
            facts.append(hub_identity(self.source.name))
        elif self.source.kind == "stdlib":
            facts += [name for name, _ in stdlib_split("all", 0.0)]
        for path in self.files:
            mark = path in self.source.validation
            facts += [mark, kind_of(path), path.suffix, file_sha256(path)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _parts(split: str, own: bool) -> list[tuple[str, bool | None]]:
    """The parts of a source to read for ``split``, each with whether it belongs, None for 'ask the hash'."""
    if split == "all":
        return [("train", True), ("validation", True)] if own else [("train", True)]
    return [(split, True)] if own else [("train", None)]


def open_corpus(spec: DataSpec) -> Corpus:
    """Find the source that ``spec`` names, without reading its text.

    Raises:
        DataError: there is no such source, or a column is named that it cannot have.
    """
    source = find_source(spec.source)
    if source.kind == "stdlib" and spec.column is not None:
        raise bad(spec.source, "no column", repr(spec.column), "Leave `column` out: files have none.")
    return Corpus(spec, source)


def documents(spec: DataSpec, split: str = "train") -> Iterator[str]:
    """The text of each document of ``split`` of ``spec``; see :meth:`Corpus.documents`."""
    return open_corpus(spec).documents(split)


def _file_faults(path: Path, column: str | None) -> tuple[list[Fault], int]:
    """What is wrong with one file, and how many documents with text were seen before the first fault."""
    texts = characters = 0
    try:
        for _, text in read_file(path, column):
            texts += bool(text.strip())
            characters += len(text)
            if characters > CHECKED_CHARACTERS:
                break
    except DataError as error:
        return [fault for fault in error.faults if isinstance(fault, Fault)], texts
    return [], texts


def check(spec: DataSpec, where: str) -> list[Fault]:
    """What is wrong with a source, found before any model is loaded.

    Reads every file to its end, or its first 32 million characters; of a hub data set only the
    description.

    Args:
        spec: what the recipe asks for.
        where: its place in the recipe, put before each fault's own place.

    Returns:
        The faults, at most ten; none where the source can be read and holds text.
    """
    found: list[Fault] = []
    try:
        source = open_corpus(spec).source
        if source.kind == "hub":
            columns = hub_columns(source.name)
            if columns:
                text_column(source.name, columns, spec.column)
    except DataError as error:
        return [_at(where, fault) for fault in error.faults if isinstance(fault, Fault)]
    if source.kind == "files":
        texts = 0
        for path in source.files:
            faults, some = _file_faults(path, spec.column)
            found += faults
            texts += some
        if not texts and not found:
            found.append(Fault(spec.source, "at least one document with text", "blank or empty", GIVE_TEXT))
    if spec.split not in SPLITS:
        found.append(Fault("split", " or ".join(SPLITS), repr(spec.split), "Name one of them."))
    if not 0 <= spec.validation_fraction < 1:
        got = str(spec.validation_fraction)
        found.append(Fault("validation_fraction", "a fraction in [0, 1)", got, "Lower it."))
    return [_at(where, fault) for fault in found[:CHECKED_FAULTS]]


def _at(where: str, fault: Fault) -> Fault:
    return Fault(f"{where}: {fault.where}", fault.expected, fault.got, fault.cure)
