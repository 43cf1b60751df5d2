"""What data a recipe asks for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

STDLIB = "stdlib:"
SUPERVISE = ("responses", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where text or dialogues come from and how they are cut.

    Attributes:
        source: a file (.txt .jsonl .json .csv .tsv .parquet), a folder, a glob, a hub data set, ``stdlib:``.
        column: the column that holds the text; found by itself where there is only one candidate.
        columns: those that hold dialogues, where their names do not say so: the prompt's, one or more, and
            the response's last; or the one with the list of messages.
        supervise: what is learnt of dialogues: ``responses`` (the default) or ``all`` tokens; text is
            learnt whole. ``responses`` also says that a source with both text and dialogues is read as those.
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
    documents: int | None = None
    split: str = "all"
    cross_documents: bool = False
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        columns = (self.columns,) if isinstance(self.columns, str) else tuple(self.columns)
        object.__setattr__(self, "columns", columns)
