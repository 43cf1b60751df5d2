"""What data a recipe asks for. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

STDLIB = "stdlib:"
SUPERVISE = ("responses", "all")
WEIGHTED = re.compile(r"\s*(.+?)\s*=\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One of several sources.

    Attributes:
        source: as DataSpec has it, as are the columns and ``supervise``.
        weight: of its rows among those of all sources; weights need not add up to anything.
        column: of the text.
        columns: of dialogues.
        supervise: of dialogues.
    """

    source: str
    weight: float = 1.0
    column: str | None = None
    columns: tuple[str, ...] = ()
    supervise: str | None = None

    def __post_init__(self) -> None:
        columns = (self.columns,) if isinstance(self.columns, str) else tuple(self.columns)
        object.__setattr__(self, "columns", columns)


def _weighted(source: str) -> tuple[Share, ...]:
    """``a.jsonl=0.7,b.jsonl=0.3`` as sources; anything else is the name of one."""
    found = [WEIGHTED.fullmatch(part) for part in source.split(",")]
    if len(found) < 2:
        return ()
    shares = [Share(source=match[1], weight=float(match[2])) for match in found if match]
    return tuple(shares) if len(shares) == len(found) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where text, dialogues or examples come from and how they are cut.

    Attributes:
        source: a file (.txt .jsonl .json .csv .tsv .parquet), a folder, a glob, a hub data set, ``stdlib:``;
            or several with weights, ``a.jsonl=0.7,b.jsonl=0.3``.
        sources: several with weights, as a mapping ``{a.jsonl: 0.7, b.jsonl: 0.3}`` or a list of mappings,
            each packed by itself, their rows mixed in these shares; text and dialogues may be mixed.
        column: the column that holds the text; found by itself where there is only one candidate.
        columns: those that hold dialogues, where their names do not say so: the prompt's, one or more, and
            the response's last; or the one with the list of messages.
        supervise: what is learnt of dialogues: ``responses`` (the default) or ``all`` tokens; text is
            learnt whole. ``responses`` also says that a source with both text and dialogues is read as those.
        examples: rows are sentences, or pairs of them, with a class where there is one, for a model that
            reads them whole; True as soon as ``pair``, ``label`` or ``labels`` is given. Of plain text each
            line is a sentence. ``column`` then names the sentence, or the first of two.
        pair: the column of the second sentence; known by the usual pairs of names otherwise.
        label: the column of the class, known by the usual names otherwise; nothing ('') reads none.
        labels: names of the classes in the order of their numbers, where a table writes names.
        header: whether .csv and .tsv files begin with the names of their columns; without, these are
            called column_1, column_2 and so on.
        documents: read at most so many documents, of each source; None reads all.
        split: which part to score when this is what quality is measured on: ``all`` or ``validation``;
            training always takes the training part.
        cross_documents: let attention cross the documents packed into one row.
        validation_fraction: of the documents, held out by a hash of their content where the source has
            no validation split of its own.
    """

    source: str = STDLIB
    sources: tuple[Share, ...] = ()
    column: str | None = None
    columns: tuple[str, ...] = ()
    supervise: str | None = None
    examples: bool = False
    pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] = ()
    header: bool = True
    documents: int | None = None
    split: str = "all"
    cross_documents: bool = False
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        for name in ("columns", "labels"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.pair is not None or self.label is not None or self.labels:
            object.__setattr__(self, "examples", True)
        named: Any = self.sources  # mappings too, as JSON has them
        if isinstance(named, Mapping):
            named = [
                {"source": source, **(one if isinstance(one, Mapping) else {"weight": one})}
                for source, one in named.items()
            ]
        given: tuple[Any, ...] = tuple(named)
        sources = tuple(Share(**one) if isinstance(one, Mapping) else one for one in given)
        weighted = () if sources else _weighted(self.source)
        object.__setattr__(self, "sources", sources or weighted)
        if weighted or (sources and self.source == STDLIB):
            object.__setattr__(self, "source", self.name_of_sources)

    @property
    def name_of_sources(self) -> str:
        """``sources`` as ``source`` writes them."""
        return ",".join(f"{share.source}={share.weight:.12g}" for share in self.sources)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each of ``sources``, adding up to 1."""
        total = math.fsum(share.weight for share in self.sources)
        return tuple(share.weight / total for share in self.sources)

    def parts(self) -> tuple[DataSpec, ...]:
        """Each of ``sources`` by itself, with the options of the whole."""
        return tuple(
            replace(
                self,
                source=share.source,
                sources=(),
                column=share.column,
                columns=share.columns,
                supervise=share.supervise or self.supervise,
            )
            for share in self.sources
        )
