"""Lines of a text file, plain or gzipped, as a stream; what is wrong with it is said with its place."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from compresskit.errors import DataError, Fault

BOM = b"\xef\xbb\xbf"
LINE_BYTES = 1 << 20


def bad(where: str, expected: str, got: str, cure: str) -> DataError:
    """A DataError of one fault."""
    return DataError(Fault(where, expected, got, cure))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bytes(path: Path) -> IO[bytes]:
    """``path`` for reading, unpacked where its name ends in ``.gz``.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return cast(IO[bytes], gzip.GzipFile(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise bad(
            str(path), "a file that can be read", str(error), "Check the path and its rights."
        ) from error


def _whole_characters(line: bytes, file: IO[bytes]) -> bytes:
    """``line``, cut at LINE_BYTES, and the rest of a character that the cut went through."""
    peek = cast(io.BufferedReader, file).peek
    while (ahead := peek(1)[:1]) and 0x80 <= ahead[0] < 0xC0:
        line += file.read(1)
    return line


def lines(path: Path, *, longest_bytes: int = -1) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the text of each line, line end included; a byte-order mark is dropped.

    Args:
        path: of a UTF-8 file, gzipped where its name ends in ``.gz``.
        longest_bytes: cut lines longer than this into pieces of the same number; -1 never cuts.

    Raises:
        DataError: unreadable, a truncated or damaged gzip stream, or not UTF-8 (with the byte offset).
    """
    number, offset = 1, 0
    with open_bytes(path) as file:
        while True:
            try:
                line = file.readline(longest_bytes)
                if longest_bytes > 0 and len(line) >= longest_bytes and not line.endswith(b"\n"):
                    line = _whole_characters(line, file)
            except (EOFError, OSError, zlib.error) as error:
                cure = "Copy or download the file again; it is truncated or damaged."
                raise bad(f"{path}:{number}", "a whole gzip stream", str(error), cure) from error
            if not line:
                return
            body = line.removeprefix(BOM) if offset == 0 else line
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                place = offset + len(line) - len(body) + error.start
                got = f"byte 0x{body[error.start]:02x} at offset {place} (counted from 0)"
                cure = "Save the file as UTF-8, e.g. iconv -f latin1 -t utf-8."
                raise bad(f"{path}:{number}", "UTF-8 text", got, cure) from error
            yield number, text
            offset += len(line)
            number += line.endswith(b"\n")
