"""What data a recipe asks for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

STDLIB = "stdlib:"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where text comes from and how it is cut.

    Attributes:
        source: a file (.txt .jsonl .json .csv .tsv .parquet), a folder, a glob, a hub data set, ``stdlib:``.
        column: the column that holds the text; found by itself where there is only one candidate.
        documents: read at most so many documents; None reads all.
        split: which part to score when this is what quality is measured on: ``all`` or ``validation``;
            training always takes the training part.
        cross_documents: let attention cross the documents packed into one row.
        validation_fraction: of the documents, held out by a hash of their content where the source has
            no validation split of its own.
    """

    source: str = STDLIB
    column: str | None = None
    documents: int | None = None
    split: str = "all"
    cross_documents: bool = False
    validation_fraction: float = 0.05
