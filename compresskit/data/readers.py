"""The documents of one file, by the ending of its name, read as a stream."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from compresskit.data.columns import row_text, text_column
from compresskit.data.jsonfile import json_lines, json_rows
from compresskit.data.lines import LINE_BYTES, bad, lines

Document = tuple[str, str]  # its place, e.g. stories.jsonl:7, and its text

SEPARATOR = "<|endoftext|>"
DOCUMENT_CHARACTERS = 4000
LONGEST_DOCUMENT_CHARACTERS = 1 << 20
ROWS_AT_ONCE = 256


def _read_text(path: Path, column: str | None) -> Iterator[Document]:
    """Plain text: cut at lines that are ``<|endoftext|>``, or else into whole paragraphs.

    Without the separator neighbouring paragraphs stay together up to about 4,000 characters, so
    that a document is long enough for a model to make use of what came before; a file without
    blank lines is cut at the end of a line, at four times that.
    """
    if column is not None:
        cure = "Leave `column` out, or name a table."
        raise bad(str(path), "a table for a column", "plain text, which has no columns", cure)
    head = islice(lines(path, longest_bytes=LINE_BYTES), 2000)
    with_separators = any(text.strip() == SEPARATOR for _, text in head)
    parts: list[str] = []
    first = size = 0
    for number, line in lines(path, longest_bytes=LINE_BYTES):
        text = line.replace("\r\n", "\n")
        separator = with_separators and text.strip() == SEPARATOR
        enough = DOCUMENT_CHARACTERS * (4 if text.strip() else 1)
        long = not with_separators and size >= enough
        if separator or long or size >= LONGEST_DOCUMENT_CHARACTERS:
            yield f"{path}:{first}", "".join(parts).strip("\n")
            parts, size = [], 0
        if not separator and (parts or text.strip()):
            first = first if parts else number
            parts.append(text)
            size += len(text)
    if parts:
        yield f"{path}:{first}", "".join(parts).strip("\n")


def _read_json_lines(path: Path, column: str | None) -> Iterator[Document]:
    yield from _of_rows(path, json_lines(path), column)


def _read_json(path: Path, column: str | None) -> Iterator[Document]:
    yield from _of_rows(path, json_rows(path), column)


def _of_rows(path: Path, rows: Iterator[tuple[int, object]], column: str | None) -> Iterator[Document]:
    for number, row in rows:
        if column is None and isinstance(row, dict):  # the first row decides for all that follow
            column = text_column(
                f"{path}:{number}", {name: isinstance(value, str) for name, value in row.items()}, None
            )
        yield f"{path}:{number}", row_text(f"{path}:{number}", row, column)


def _read_table(path: Path, column: str | None) -> Iterator[Document]:
    # Tab-separated files of the usual benchmarks hold lone quotation marks: there a quote is a letter.
    tabs = ".tsv" in path.suffixes[-2:]
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    # The limit is the process' own; raised for good, as a document may be longer than 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    table = csv.reader((text for _, text in lines(path)), **style)
    rows = _table_rows(path, table)
    _, header = next(rows, (0, []))
    if not header:
        raise bad(str(path), "a header and rows", "an empty file", "Give a file with text.")
    first = next(rows, None)
    if first is None:
        raise bad(str(path), "rows under the header", "a header alone", "Give a file with text.")
    columns = {name: not _is_number(value) for name, value in zip(header, first[1], strict=True)}
    at = header.index(text_column(f"{path}:1", columns, column))
    yield f"{path}:{first[0]}", first[1][at]
    for number, row in rows:
        yield f"{path}:{number}", row[at]


def _table_rows(path: Path, table: Any) -> Iterator[tuple[int, list[str]]]:
    width, number = 0, 1
    try:
        for row in table:
            if row:
                width = width or len(row)
                if len(row) != width:
                    cure = "Mend that line: a separator or a quotation mark is missing or too many."
                    got = f"{len(row)} fields"
                    raise bad(f"{path}:{number}", f"{width} fields as in the header", got, cure)
                yield number, row
            number = table.line_num + 1
    except csv.Error as error:
        cure = "Mend the quotation marks of that row, or copy the file again."
        raise bad(f"{path}:{number}", "a well-formed row", str(error), cure) from error


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_text(kind: Any) -> bool:
        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            columns = {field.name: is_text(field.type) for field in file.schema_arrow}
            name = text_column(str(path), columns, column)
            if not columns[name]:
                got = str(file.schema_arrow.field(name).type)
                cure = "Set `column` to one that holds text."
                raise bad(str(path), f"text in column {name!r}", got, cure)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[name]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path} row {number}", value or ""
    except (OSError, pa.ArrowException) as error:
        cure = "Copy or download the file again; it is truncated or no parquet file."
        raise bad(str(path), "a whole parquet file", str(error).splitlines()[0], cure) from error


Reader = Callable[[Path, "str | None"], Iterator[Document]]
READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".raw": _read_text,
    ".tokens": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def kind_of(path: Path) -> str:
    """The ending that decides how ``path`` is read (of ``a.jsonl.gz`` it is ``.jsonl``), or nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes = [] if suffixes[-2:-1] == [".parquet"] else suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


def read_file(path: Path, column: str | None) -> Iterator[Document]:
    """The place and the text of each document of one file, blank ones included.

    Args:
        path: a file of a known kind.
        column: of the text, in a table; None finds it.

    Raises:
        DataError: unknown kind, unreadable, truncated, malformed, not UTF-8, or without such a column.
    """
    kind = kind_of(path)
    if not kind:
        cure = "Convert the file, or rename it to what it is."
        raise bad(str(path), "a file of kind " + " ".join(READERS), repr(path.suffix or "no ending"), cure)
    yield from READERS[kind](path, column)
