"""The documents of one file, by the ending of its name, read as a stream."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from compresskit.data.columns import Layout, Read, find_layout
from compresskit.data.jsonfile import json_lines, json_rows
from compresskit.data.lines import LINE_BYTES, bad, lines
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError, Fault

Document = tuple[str, Read]  # its place, e.g. stories.jsonl:7, and its text, dialogue or example
Row = tuple[str, object, Layout]  # place, value, and what its columns are read as

LONGEST_NAME = 40
SEPARATOR = "<|endoftext|>"
DOCUMENT_CHARACTERS = 4000
LONGEST_DOCUMENT_CHARACTERS = 1 << 20
ROWS_AT_ONCE = 256
PLAIN = Layout()
SENTENCE = Layout(examples=True)
HEADLESS = "If the file has no header, set data.header=false and name columns by number, as in column_2."


def _read_text(path: Path, spec: DataSpec) -> Iterator[Row]:
    """Plain text: cut at lines that are ``<|endoftext|>``, or else into whole paragraphs.

    Without the separator neighbouring paragraphs stay together up to about 4,000 characters, so
    that a document is long enough for a model to make use of what came before; a file without
    blank lines is cut at the end of a line, at four times that. Of examples each line is one.
    """
    refuse_columns(str(path), spec)
    if spec.examples:
        yield from ((f"{path}:{number}", text.strip(), SENTENCE) for number, text in lines(path))
        return
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
            yield f"{path}:{first}", "".join(parts).strip("\n"), PLAIN
            parts, size = [], 0
        if not separator and (parts or text.strip()):
            first = first if parts else number
            parts.append(text)
            size += len(text)
    if parts:
        yield f"{path}:{first}", "".join(parts).strip("\n"), PLAIN


def refuse_columns(where: str, spec: DataSpec) -> None:
    """DataError if ``spec`` asks for columns, or for dialogues, of what is plain text."""
    asked: dict[str, object] = {"column": spec.column, "columns": spec.columns}
    asked |= {"pair": spec.pair, "label": spec.label, "labels": spec.labels}
    asked |= {"supervise": spec.supervise if spec.supervise == "responses" else None}
    for name, value in asked.items():
        if value:
            cure = f"Leave data.{name} out, or name a table."
            raise bad(where, f"a table for {name}", "plain text, which has no columns", cure)


def _read_json_lines(path: Path, spec: DataSpec) -> Iterator[Row]:
    yield from _of_rows(path, json_lines(path), spec)


def _read_json(path: Path, spec: DataSpec) -> Iterator[Row]:
    yield from _of_rows(path, json_rows(path), spec)


def _of_rows(path: Path, rows: Iterator[tuple[int, object]], spec: DataSpec) -> Iterator[Row]:
    layout = None
    for number, row in rows:
        place = f"{path}:{number}"
        if layout is None and isinstance(row, dict):  # the first row decides for all that follow
            layout = find_layout(place, {name: isinstance(value, str) for name, value in row.items()}, spec)
        yield place, row, layout or (SENTENCE if spec.examples else PLAIN)


def _read_table(path: Path, spec: DataSpec) -> Iterator[Row]:
    # Tab-separated files of the usual benchmarks hold lone quotation marks: there a quote is a letter.
    tabs = ".tsv" in path.suffixes[-2:]
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    # The limit is the process' own; raised for good, as a document may be longer than 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    table = csv.reader((text for _, text in lines(path)), **style)
    rows = _table_rows(path, table)
    head, header = next(rows, (0, []))
    if not header:
        raise bad(str(path), "a header and rows", "an empty file", "Give a file with text.")
    first = (head, header) if not spec.header else next(rows, None)
    if first is None:
        raise bad(str(path), "rows under the header", "a header alone", "Give a file with text.")
    names = header if spec.header else [f"column_{number + 1}" for number in range(len(header))]
    columns = {name: not _is_number(value) for name, value in zip(names, first[1], strict=True)}
    place = f"{path}:{head}"
    try:
        layout = find_layout(place, columns, spec)
    except DataError as error:
        raise _or_headless(error, header, spec) from error
    if spec.header:
        _require_names(place, header, layout, spec)
    for number, row in chain([first], rows):
        yield f"{path}:{number}", dict(zip(names, row, strict=True)), layout


def _or_headless(error: DataError, header: list[str], spec: DataSpec) -> DataError:
    """``error``, with one more cure where the first line hardly holds names."""
    if not spec.header or not any(_is_number(n) or len(n) > LONGEST_NAME for n in header):
        return error
    faults = [fault for fault in error.faults if isinstance(fault, Fault)]
    return DataError(*(Fault(f.where, f.expected, f.got, f"{f.cure} {HEADLESS}") for f in faults))


def _require_names(place: str, header: list[str], layout: Layout, spec: DataSpec) -> None:
    """DataError if the first line is no header, or one that does not say which column is meant."""
    read = layout.required
    if twice := [name for name in read if header.count(name) > 1]:
        cure = "Give each column a name of its own."
        raise bad(place, "different names of columns", f"{twice[0]!r} twice", cure)
    # A column chosen by the user is its name; else the first line of a table without a header would be lost.
    chosen = spec.column is not None or spec.columns
    if not chosen and (numbers := [name for name in header if _is_number(name)]):
        cure = f"{HEADLESS} If it has one, set data.column."
        raise bad(place, "the names of columns in the first line", f"the number {numbers[0]}", cure)


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


def _read_parquet(path: Path, spec: DataSpec) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_text(kind: Any) -> bool:
        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            columns = {field.name: is_text(field.type) for field in file.schema_arrow}
            layout = find_layout(str(path), columns, spec)
            names = layout.wanted(columns)
            if layout.text and not columns[layout.text]:
                got = str(file.schema_arrow.field(layout.text).type)
                cure = "Set data.column to one that holds text."
                raise bad(str(path), f"text in column {layout.text!r}", got, cure)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row, layout
    except (OSError, pa.ArrowException) as error:
        cure = "Copy or download the file again; it is truncated or no parquet file."
        raise bad(str(path), "a whole parquet file", str(error).splitlines()[0], cure) from error


Reader = Callable[[Path, DataSpec], Iterator[Row]]
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


def read_file(path: Path, spec: DataSpec, faults: list[Fault] | None = None) -> Iterator[Document]:
    """The place and the content of each document of one file, blank texts included.

    Args:
        path: a file of a known kind.
        spec: which columns of a table hold the text or the dialogues; without a choice they are found.
        faults: gets what is wrong with single rows, which are then left out; None raises it.

    Raises:
        DataError: unknown kind, unreadable, truncated, malformed, not UTF-8, or without such a column.
    """
    kind = kind_of(path)
    if not kind:
        cure = "Convert the file, or rename it to what it is."
        raise bad(str(path), "a file of kind " + " ".join(READERS), repr(path.suffix or "no ending"), cure)
    yield from contents_of(READERS[kind](path, spec), faults)


def contents_of(rows: Iterable[Row], faults: list[Fault] | None = None) -> Iterator[Document]:
    """The documents in ``rows``; see :func:`read_file`."""
    for place, row, layout in rows:
        try:
            contents = layout.contents(place, row)
        except DataError as error:
            if faults is None:
                raise
            faults += [fault for fault in error.faults if isinstance(fault, Fault)]
            continue
        for content in contents:
            yield place, content
