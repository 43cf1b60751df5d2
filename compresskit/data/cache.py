"""The token cache: a corpus' token ids on disk, memory-mapped by every process that trains.

One folder per entry, named by a hash of everything that decides its contents: the text, the
tokenizer, the options and this code's version. A folder is written beside its final name and
renamed, so a reader sees a whole entry or none, and of two processes that build the same entry
at once one wins and both use it.

Files: ``tokens.bin`` (N little-endian ids), ``starts.npy`` (the offset of each document's first
token, int64 (D,)), ``entry.json`` (sizes and checksums), and for dialogues ``learnt.npy`` (which
tokens are learnt, as runs: first and end of each, int64 (S, 2); 16 bytes a response). For examples
``types.bin`` (the segment of each token, uint8 (N,), where the tokenizer tells segments apart) and
``labels.npy`` (the class of each document, int64 (D,)).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
import warnings
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compresskit.data.lines import file_sha256
from compresskit.errors import DataError, Fault

VERSION = 2
STALE_S = 24 * 3600.0
TOKENS, STARTS, LEARNT, ENTRY = "tokens.bin", "starts.npy", "learnt.npy", "entry.json"
TYPES, LABELS = "types.bin", "labels.npy"


class Piece(NamedTuple):
    """One document on its way into an entry.

    Attributes:
        ids: of its tokens.
        learnt: runs of tokens that are learnt, first and end of each, in order; None is all of them.
        types: the segment of each token, below 256.
        label: the class of the document.

    All pieces of an entry have such a part, or none has.
    """

    ids: list[int]
    learnt: list[tuple[int, int]] | None = None
    types: list[int] | None = None
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One whole entry of the cache.

    Attributes:
        folder: where it lies.
        tokens: token ids (N,), memory-mapped, uint16 or uint32.
        starts: offset of each document's first token (D,), int64, increasing, the first one 0.
        notes: sentences about the source for whoever uses the tokens.
        learnt: runs of tokens that are learnt (S, 2), first and end of each, in order and inside one
            document; None where all tokens are.
        types: segment of each token (N,), uint8, memory-mapped; None where there are none.
        labels: class of each document (D,), int64; None where there are none.
    """

    folder: Path
    tokens: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    notes: tuple[str, ...]
    learnt: npt.NDArray[np.int64] | None = None
    types: npt.NDArray[np.uint8] | None = None
    labels: npt.NDArray[np.int64] | None = None


def read_entry(folder: Path) -> Entry:
    """Open the entry in ``folder``.

    Raises:
        ValueError: the entry is damaged; the message says how.
        OSError: a file of it cannot be read.
    """
    facts = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise ValueError(f"{ENTRY} is not of version {VERSION}")
    for name, digest in facts["sha256"].items():
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{name} differs from its checksum")
    tokens = np.memmap(folder / TOKENS, dtype=facts["dtype"], mode="r")
    has = facts["sha256"].keys()
    return Entry(
        folder,
        tokens,
        np.load(folder / STARTS),
        tuple(facts["notes"]),
        np.load(folder / LEARNT) if LEARNT in has else None,
        np.memmap(folder / TYPES, dtype=np.uint8, mode="r") if TYPES in has else None,
        np.load(folder / LABELS) if LABELS in has else None,
    )


def _write(folder: Path, pieces: Iterable[Piece], dtype: str, notes: Iterable[str]) -> None:
    starts, labels = array("q"), array("q")  # 8 bytes a number: a source may hold many millions
    learnt, offset = array("q"), 0
    names = [TOKENS, STARTS]
    with (folder / TOKENS).open("wb") as file, (folder / TYPES).open("wb") as types:
        for piece in pieces:
            starts.append(offset)
            for first, end in piece.learnt or ():
                learnt.extend((offset + first, offset + end))
            if piece.label is not None:
                labels.append(piece.label)
            if piece.types is not None:
                types.write(np.asarray(piece.types, dtype=np.uint8).tobytes())
            parts = ((LEARNT, piece.learnt), (TYPES, piece.types), (LABELS, piece.label))
            names = [TOKENS, STARTS, *(name for name, part in parts if part is not None)]
            offset += len(piece.ids)
            file.write(np.asarray(piece.ids, dtype=dtype).tobytes())
        for written in (file, types):
            written.flush()
            os.fsync(written.fileno())
    if TYPES not in names:
        (folder / TYPES).unlink()
    np.save(folder / STARTS, np.asarray(starts, dtype=np.int64))
    if LEARNT in names:
        np.save(folder / LEARNT, np.asarray(learnt, dtype=np.int64).reshape(-1, 2))
    if LABELS in names:
        np.save(folder / LABELS, np.asarray(labels, dtype=np.int64))
    facts = {
        "version": VERSION,
        "dtype": dtype,
        "sha256": {name: file_sha256(folder / name) for name in names},
        "notes": list(notes),  # read after the pieces: a generator's last words about its source
    }
    (folder / ENTRY).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _sweep(cache: Path) -> None:
    """Remove what a killed process left half-written, a day later."""
    for path in cache.glob(".*.part"):
        try:
            if time.time() - path.stat().st_mtime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process swept it first


def build_entry(
    cache: Path, key: str, pieces: Iterable[Piece], *, dtype: str, notes: Iterable[str] = ()
) -> Entry:
    """The entry called ``key``: opened where it is whole, else written from ``pieces``.

    Args:
        cache: the folder of all entries; made if need be.
        key: hash of everything that decides the entry's contents.
        pieces: the documents; consumed only where the entry has to be written.
        dtype: numpy name of the stored integers, ``<u2`` or ``<u4``.
        notes: kept with the entry; consumed after ``pieces``.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = cache / key
    if folder.exists():
        try:
            return read_entry(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            # A damaged entry costs time, not results; it is replaced, and the user hears of the disk.
            warnings.warn(f"The token cache {folder} is damaged ({error}); it is rebuilt.", stacklevel=3)
            _remove(folder)
    try:
        return _build(cache, key, pieces, dtype, notes)
    except OSError as error:
        cure = "Make room or name another cache folder."
        raise DataError(Fault(str(cache), "a folder that can be written", str(error), cure)) from error


def _build(cache: Path, key: str, pieces: Iterable[Piece], dtype: str, notes: Iterable[str]) -> Entry:
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    folder, part = cache / key, cache / f".{key}.{os.getpid()}.{secrets.token_hex(4)}.part"
    part.mkdir()
    try:
        _write(part, pieces, dtype, notes)
        try:
            part.rename(folder)
        except OSError:  # another process was first; its entry has the same contents
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return read_entry(folder)


def _remove(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        folder.rename(aside)  # at once for every reader; removing file by file would not be
    except FileNotFoundError:
        return  # another process found the damage first
    shutil.rmtree(aside, ignore_errors=True)


def key_of(*facts: str) -> str:
    """A name for the entry that ``facts`` decide."""
    return hashlib.sha256("\0".join((str(VERSION), *facts)).encode()).hexdigest()[:40]
