"""What data a recipe asks for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

STDLIB = "stdlib:"
SUPERVISE = ("responses", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where text, dialogues or examples come from and how they are cut.

    Attributes:
        source: a file (.txt .jsonl .json .csv .tsv .parquet), a folder, a glob, a hub data set, ``stdlib:``.
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
        documents: read at most so many documents; None reads all.
        split: which part to score when this is what quality is measured on: ``all`` or ``validation``;
            training always takes the training part.
        cross_documents: let attention cross the documents packed into one row.
        validation_fraction: of the documents, held out by a hash of their content where the source has
            no validation split of its own.
    """

    source: str = STDLIB
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
