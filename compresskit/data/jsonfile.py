"""Rows of a .json file: an array (read as a stream), JSON lines under another name, or one object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from compresskit.data.lines import LINE_BYTES, bad, lines
from compresskit.errors import DataError

BLANKS = " \t\r\n"
NUMBER_TAIL = re.compile(r"[-+.0-9eE]*")
COPY_AGAIN = "Copy or download the file again, or mend that line."


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The line number and the row of each line that is not blank.

    Raises:
        DataError: a line is no JSON; the message has its number.
    """
    for number, line in lines(path):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                got = f"{error.msg} at column {error.colno}"
                raise bad(f"{path}:{number}", "one JSON value per line", got, COPY_AGAIN) from error


def json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """The line number and the row of each row of a .json file.

    An object with a single list among its values stands for the rows of that list.

    Raises:
        DataError: the file is empty, truncated or no JSON; the message has the line.
    """
    pieces = lines(path, longest_bytes=LINE_BYTES)
    head = next(((n, text) for n, text in pieces if text.strip()), None)
    if head is None:
        raise bad(str(path), "rows of JSON", "an empty file", "Give a file with text.")
    if head[1].lstrip().startswith("["):
        yield from _array(path, chain([head], pieces))
        return
    whole = (text for _, text in lines(path) if text.strip())
    first, second = next(whole), next(whole, "")
    if second.lstrip()[:1] in ("{", '"') and _is_json(first):
        yield from json_lines(path)
        return
    yield from _document(path)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _document(path: Path) -> Iterator[tuple[int, object]]:
    text = "".join(text for _, text in lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
        raise bad(f"{path}:{error.lineno}", "a whole JSON document", got, COPY_AGAIN) from error
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    for row in lists[0] if len(lists) == 1 else [value]:
        yield 1, row


class _Array:
    """A cursor in one array that holds no more than the row at hand and what was read with it."""

    def __init__(self, path: Path, pieces: Iterator[tuple[int, str]]) -> None:
        self._path, self._pieces = path, pieces
        self._text, self._at, self._line = "", 0, 1
        self._ended = False
        self._decoder = json.JSONDecoder()

    def error(self, got: str) -> DataError:
        """What is wrong at the cursor's line."""
        return bad(f"{self._path}:{self._line}", "a whole JSON array", got, COPY_AGAIN)

    def _fill(self, ahead: int) -> None:
        """Read until ``ahead`` characters lie ahead of the cursor, or to the end of the file."""
        parts, size = [self._text[self._at :]], len(self._text) - self._at
        while size < ahead and not self._ended:
            number, piece = next(self._pieces, (0, ""))
            self._ended = number == 0
            parts.append(piece)
            size += len(piece)
        self._text, self._at = "".join(parts), 0

    def peek(self) -> str:
        """The next character that is not blank, or nothing at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANKS:
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._fill(1)

    def skip(self, wanted: str) -> bool:
        """Step over the character ``wanted`` if it is next."""
        if self.peek() != wanted:
            return False
        self._at += 1
        return True

    def row(self) -> tuple[int, object]:
        """The line number and the value of the row at the cursor; steps over it."""
        while True:
            try:
                row, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Of a row that is only not read to its end, the fault lies at the end of what is read.
                cut = error.msg.startswith("Unterminated") or len(self._text) - error.pos < 16
                if self._ended or not cut:
                    self._line += self._text.count("\n", self._at, error.pos)
                    end_of_file = ": the file ends inside a row" if cut else ""
                    raise self.error(error.msg + end_of_file) from error
                # Twice as much each time, or a long row would cost squared time.
                self._fill(max(2 * (len(self._text) - self._at), LINE_BYTES))
                continue
            # A number at the end of what is read may go on: "1" of "1.5", "2" of "2e-3".
            open_end = isinstance(row, int | float) and NUMBER_TAIL.fullmatch(self._text, end)
            if self._ended or not open_end:
                number = self._line
                self._line += self._text.count("\n", self._at, end)
                self._at = end
                return number, row
            self._fill(len(self._text) - self._at + 1)


def _array(path: Path, pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, object]]:
    array = _Array(path, pieces)
    array.skip("[")
    if not array.skip("]"):
        while True:
            if not array.peek():
                raise array.error("the end of the file inside the array")
            yield array.row()
            if array.skip("]"):
                break
            if not array.skip(","):
                raise array.error(f"{array.peek() or 'the end of the file'!r} where ',' or ']' belongs")
    if array.peek():
        raise array.error(f"{array.peek()!r} after the array")
