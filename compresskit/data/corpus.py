"""A data source as a stream of texts, dialogues or examples, split into training and validation."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from compresskit.data.columns import Read, find_layout
from compresskit.data.dialogue import Content, Dialogue
from compresskit.data.example import Example
from compresskit.data.hub import hub_columns, hub_documents, hub_identity, hub_splits
from compresskit.data.lines import bad, file_sha256, lines
from compresskit.data.readers import kind_of, read_file, refuse_columns
from compresskit.data.source import Source, find_source
from compresskit.data.spec import SUPERVISE, DataSpec
from compresskit.data.stdlib import held_out, stdlib_split
from compresskit.errors import DataError, Fault

SPLITS = ("train", "validation", "all")
CHECKED_CHARACTERS = 1 << 25
CHECKED_FAULTS = 10
CHECKED_ROWS = 3
GIVE_TEXT = "Give a source with text."
KINDS: dict[type[Read], str] = {str: "text", Dialogue: "a dialogue", Example: "a sentence with its class"}
SEEN: dict[type[Read], str] = {str: "text", Dialogue: "dialogues", Example: "examples"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """One data source.

    Attributes:
        spec: what was asked for.
        source: what its name stands for.
        parts: of several sources mixed, each by itself; else none.
    """

    spec: DataSpec
    source: Source
    parts: tuple[Corpus, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read, in order; none for a data set of the hub."""
        return self.source.files

    @property
    def is_dialogue(self) -> bool:
        """Whether the documents are dialogues; reads the first of them.

        Raises:
            DataError: it cannot be read.
        """
        if self.parts:
            return any(part.is_dialogue for part in self.parts)
        return any(isinstance(content, Dialogue) for _, content, _ in islice(self._marked("all"), 1))

    def documents(self, split: str = "train", notes: list[str] | None = None) -> Iterator[Content]:
        """Each document of ``split``, text or dialogue, in a fixed order, read as a stream.

        A source with a validation split of its own is taken at its word. Of any other, documents are
        held out by a hash of their text (of the relative path for ``stdlib:``); the first one is always
        training and the second always validation, so that even a tiny source has both. Documents of several
        sources come in the shares of these, until all are at their end.

        Args:
            split: ``train``, ``validation`` or ``all``; ``DataSpec.documents`` limits each by itself.
            notes: gets sentences about what was left out, once the stream has ended.

        Raises:
            DataError: unreadable, malformed, or no text in it; also while the stream is read.
                Text and dialogues in one source are refused.
        """
        if self.spec.examples:
            cure = "Leave data.examples, pair, label and labels out."
            raise bad(self.spec.source, "text or dialogues", "sentences with classes", cure)
        return (content for content in self._read(split, notes) if not isinstance(content, Example))

    def examples(self, split: str = "train", notes: list[str] | None = None) -> Iterator[Example]:
        """Each example of ``split``; see :meth:`documents`, of which a source has either.

        Raises:
            DataError: as there.
        """
        return (content for content in self._read(split, notes) if isinstance(content, Example))

    def _read(self, split: str, notes: list[str] | None) -> Iterator[Read]:
        if split not in SPLITS:
            raise bad("split", " or ".join(SPLITS), repr(split), "Name one of them.")
        if self.spec.documents is not None and self.spec.documents < 1:
            raise bad("documents", "at least 1", str(self.spec.documents), "Raise it, or leave it out.")
        found = [] if notes is None else notes
        if self.parts:
            return _in_turn([part._read(split, found) for part in self.parts], self.spec.shares)
        return self._contents(split, found)

    def _contents(self, split: str, notes: list[str]) -> Iterator[Read]:
        blank = rows = texts = given = 0
        one_sided, first_sided = 0, ""
        kind: type[Read] | None = None
        for place, content, wanted in self._marked(split):
            rows += 1
            if _is_blank(content):
                blank += 1
                continue
            if isinstance(content, Example) and not content.is_whole:
                one_sided, first_sided = one_sided + 1, first_sided or place
                continue
            texts += 1
            kind = kind or type(content)
            _require_kind(place, content, kind)
            try:
                key = str(content).encode()
            except UnicodeEncodeError as error:
                got = f"a lone surrogate at character {error.start}"
                raise bad(place, "text of Unicode characters", got, "Mend the text of that row.") from error
            if wanted is None:
                held = texts == 2 or (texts > 2 and held_out(key, self.spec.validation_fraction))
                wanted = held == (split == "validation")
            if wanted:
                yield content
                given += 1
                if given == self.spec.documents:
                    break
        if texts == 0:
            got = f"{rows} blank documents" if rows else "an empty source"
            got = f"{rows} rows, none with text on every side" if one_sided else got
            raise bad(self.spec.source, "at least one document with text", got, GIVE_TEXT)
        if blank:
            notes.append(f"{self.spec.source}: {blank} of {rows} documents are blank and were left out.")
        if one_sided:
            notes.append(
                f"{self.spec.source}: {one_sided} of {rows} pairs have one side only and were left out, "
                f"the first at {first_sided}."
            )
        if self.source.left_out:
            names = ", ".join(path.name for path in self.source.left_out[:5])
            notes.append(f"{self.spec.source}: files of a test split were left out: {names}.")

    def _marked(self, split: str) -> Iterator[tuple[str, Read, bool | None]]:
        """Place, content and whether the document is in ``split``; None where its hash is to decide."""
        if self.source.kind == "stdlib":
            for name, path in stdlib_split(split, self.spec.validation_fraction):
                text = "".join(text for _, text in lines(path))
                yield name, Example(text) if self.spec.examples else text, True
            return
        if self.source.kind == "hub":
            for part, decided in _parts(split, "validation" in hub_splits(self.source.name)):
                for place, content in hub_documents(self.spec, part):
                    yield place, content, decided
            return
        own = bool(self.source.validation)
        files = {"train": self.source.train, "validation": self.source.validation}
        for part, decided in _parts(split, own):
            for path in files[part]:
                for place, content in read_file(path, self.spec):
                    yield place, content, decided

    def fingerprint(self) -> str:
        """A hash of everything that decides the documents and their split, but not of where files lie."""
        spec = self.spec
        if self.parts:
            shares = [f"{share:.9f}" for share in spec.shares]
            whole = [*zip(shares, (part.fingerprint() for part in self.parts), strict=True)]
            return hashlib.sha256(repr(whole).encode()).hexdigest()
        facts: list[object] = [
            spec.column,
            spec.columns,
            spec.supervise,
            spec.documents,
            spec.validation_fraction,
            self.source.kind,
        ]
        if spec.examples or not spec.header:  # else as ever, so that caches stay good
            facts += [spec.examples, spec.pair, spec.label, spec.labels, spec.header]
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
    if spec.sources:
        if faults := _share_faults(spec):
            raise DataError(*faults)
        parts = tuple(open_corpus(part) for part in spec.parts())
        files = tuple(path for part in parts for path in part.source.files)
        kinds = {part.source.kind for part in parts}
        return Corpus(spec, Source(kinds.pop() if len(kinds) == 1 else "several", spec.source, files), parts)
    source = find_source(spec.source)
    if spec.supervise not in (None, *SUPERVISE):
        expected = " or ".join(SUPERVISE)
        raise bad("supervise", expected, repr(spec.supervise), "Name one of them, or leave it out.")
    if spec.column is not None and (spec.columns or spec.supervise == "responses"):
        other = f"columns {', '.join(spec.columns)}" if spec.columns else "supervise: responses"
        got = f"column {spec.column} and {other}"
        raise bad(spec.source, "a column of text or dialogues", got, "Leave one of them out.")
    if spec.examples and (spec.columns or spec.supervise):
        got = f"also {'columns' if spec.columns else 'supervise'}, which dialogues have"
        cure = "Name a sentence by data.column and its pair by data.pair, or leave out what examples have."
        raise bad(spec.source, "examples or dialogues", got, cure)
    if source.kind == "stdlib":
        refuse_columns(spec.source, spec)
    return Corpus(spec, source)


def _share_faults(spec: DataSpec) -> list[Fault]:
    """What is wrong with how several sources are named and weighed."""
    found = []
    if spec.source != spec.name_of_sources:
        got = f"source {spec.source} and {len(spec.sources)} sources"
        found.append(Fault("source", "one source, or several", got, "Name it among the sources."))
    if spec.column is not None or spec.columns or spec.examples:
        got = "columns of the whole" if not spec.examples else "sentences with classes"
        cure = "Write column and columns beside each source's weight." if not spec.examples else "Name one."
        found.append(Fault("sources", "texts or dialogues with columns of their own", got, cure))
    for number, share in enumerate(spec.sources):
        if not (share.weight > 0 and math.isfinite(share.weight)):
            cure = "Raise it, or leave that source out."
            found.append(Fault(f"sources[{number}].weight", "a weight above 0", f"{share.weight:g}", cure))
    names = [(share.source, share.column, share.columns) for share in spec.sources]
    for name in dict.fromkeys(one for one in names if names.count(one) > 1):
        found.append(Fault("sources", "different sources", f"{name[0]} twice", "Add up its weights."))
    return found


def _in_turn(streams: list[Iterator[Read]], shares: tuple[float, ...]) -> Iterator[Read]:
    """The items of ``streams``, the one that is most behind its share next."""
    counts = dict.fromkeys(range(len(streams)), 0)
    while counts:
        number = min(counts, key=lambda i: (counts[i] + 0.5) / shares[i])
        for content in islice(streams[number], 1):
            yield content
            counts[number] += 1
            break
        else:
            del counts[number]


def documents(spec: DataSpec, split: str = "train") -> Iterator[str]:
    """The text of each document of ``split`` of ``spec``; see :meth:`Corpus.documents`.

    Raises:
        DataError: the documents are dialogues.
    """
    return (_as_text(spec.source, content) for content in open_corpus(spec).documents(split))


def _as_text(source: str, content: Content) -> str:
    _require_kind(source, content, str)
    return str(content)


def _require_kind(place: str, content: Read, kind: type[Read]) -> None:
    if not isinstance(content, kind):
        cure = "Name a source of one kind, or set data.column or data.columns."
        raise bad(place, f"{KINDS[kind]}, as elsewhere", KINDS[type(content)], cure)


def _is_blank(content: Read) -> bool:
    return content.is_blank if isinstance(content, Example) else not str(content).strip()


def _file_faults(path: Path, spec: DataSpec) -> tuple[list[Fault], Counter[str]]:
    """What is wrong with one file, and how many contents of each kind were seen before the end or a fault."""
    seen: Counter[str] = Counter()
    faults: list[Fault] = []
    characters = 0
    try:
        for _, content in read_file(path, spec, faults):
            if not _is_blank(content) and (not isinstance(content, Example) or content.is_whole):
                seen[SEEN[type(content)]] += 1
            characters += len(str(content))
            if characters > CHECKED_CHARACTERS:
                break
    except DataError as error:
        faults += [fault for fault in error.faults if isinstance(fault, Fault)]
    return _fewer(faults), seen


def _fewer(faults: list[Fault]) -> list[Fault]:
    """The first few faults of a file's rows, the last of them with the number of the rest."""
    if len(faults) <= CHECKED_ROWS:
        return faults
    *first, last = faults[:CHECKED_ROWS]
    rest = f"{last.got} (and {len(faults) - CHECKED_ROWS} more rows of that file are wrong)"
    return [*first, Fault(last.where, last.expected, rest, last.cure)]


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
    if spec.sources:
        found = _share_faults(spec)
        places = [f"{where}.sources[{number}]" for number in range(len(spec.sources))]
        parts = zip(spec.parts(), places, strict=True)
        return [_at(where, fault) for fault in found] + [f for part, at in parts for f in check(part, at)]
    try:
        source = open_corpus(spec).source
        if source.kind == "hub":
            columns = hub_columns(source.name)
            if columns:
                find_layout(source.name, columns, spec)
    except DataError as error:
        return [_at(where, fault) for fault in error.faults if isinstance(fault, Fault)]
    if source.kind == "files":
        seen: Counter[str] = Counter()
        for path in source.files:
            faults, some = _file_faults(path, spec)
            found += faults
            seen += some
        if len(seen) > 1 and not found:
            got = " and ".join(f"{count} {kind}" for kind, count in seen.items())
            found.append(Fault(spec.source, "text or dialogues", got, "Name the files of one kind."))
        if not seen and not found:
            found.append(Fault(spec.source, "at least one document with text", "blank or empty", GIVE_TEXT))
    if spec.split not in SPLITS:
        found.append(Fault("split", " or ".join(SPLITS), repr(spec.split), "Name one of them."))
    if not 0 <= spec.validation_fraction < 1:
        got = str(spec.validation_fraction)
        found.append(Fault("validation_fraction", "a fraction in [0, 1)", got, "Lower it."))
    return [_at(where, fault) for fault in found[:CHECKED_FAULTS]]


def _at(where: str, fault: Fault) -> Fault:
    return Fault(f"{where}: {fault.where}", fault.expected, fault.got, fault.cure)
