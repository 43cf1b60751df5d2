"""Which column of a table holds the text."""

from __future__ import annotations

from collections.abc import Mapping

from compresskit.data.lines import bad
from compresskit.registry import nearest

PREFERRED = ("text", "content", "story", "sentence", "document", "body", "article", "code")


def text_column(where: str, columns: Mapping[str, bool], wanted: str | None) -> str:
    """The name of the column to read.

    Args:
        where: the file, for the error.
        columns: name of each column and whether it holds text.
        wanted: the user's choice; None looks for a usual name, then for the only column with text.

    Raises:
        DataError: ``wanted`` is not there, or there is no single candidate; both list the columns.
    """
    names = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted not in columns:
            cure = f"Did you mean: {nearest(wanted, columns)}? Set `column` to the one with the text."
            raise bad(where, f"a column called {wanted!r}", f"columns {names}", cure)
        return wanted
    lower = {name.lower(): name for name in columns if columns[name]}
    for name in PREFERRED:
        if name in lower:
            return lower[name]
    if len(lower) == 1:
        return next(iter(lower.values()))
    kind = "several columns of text" if lower else "no column of text"
    raise bad(
        where,
        "one column of text, or one of the names " + ", ".join(PREFERRED),
        f"{kind}; the columns are {names}",
        "Set `column` to the one with the text." if lower else "Name a source that has text.",
    )


def row_text(where: str, row: object, column: str | None) -> str:
    """The text in ``column`` of one row of JSON; a row that is a string is its own text.

    Returns:
        The text; empty where the value is null.

    Raises:
        DataError: the row is no object, lacks the column or holds something else than text there.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        cure = "Write one object or one string per row."
        raise bad(where, "an object or a string", type(row).__name__, cure)
    if column is None or column not in row:
        column = text_column(where, {name: isinstance(v, str) for name, v in row.items()}, column)
    value = row[column]
    if value is not None and not isinstance(value, str):
        cure = "Set `column` to one that holds text."
        raise bad(where, f"text in column {column!r}", type(value).__name__, cure)
    return value or ""
