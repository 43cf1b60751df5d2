"""The files of a cache: each is written whole, lasts through a crash, and is named by its checksum.

``part-00003-<checksum>.safetensors`` holds the columns of some rows; beside them ``hashes`` (R, 2),
``tokens`` (R,) and ``lines`` (R,), how many entries each row has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from compresskit.errors import DataError, Fault, OutputError

CHECKSUM_BYTES = 16
BLOCK_BYTES = 1 << 24
PART = "part-{:05d}-{}.safetensors"
PARTIAL = ".{}.partial"


def write_whole(path: Path, data: bytes) -> None:
    """``data`` as the file ``path``, on the disk when this returns; never half of it under that name.

    One process at a time may write a file: its folder is locked, or it can be made again.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path.parent, f"{len(data):,} bytes more", str(error)) from error


def partial_of(path: Path) -> Path:
    """Where the file ``path`` is until it is whole."""
    return path.with_name(PARTIAL.format(path.name))


def remove_partials(folder: Path) -> None:
    """Remove what a process left half-written that was killed; for the one that has locked ``folder``."""
    for path in folder.glob(PARTIAL.format("*")):
        path.unlink(missing_ok=True)


def unwritable(folder: Path, expected: str, got: str) -> OutputError:
    """The error of a cache that its folder has no room for."""
    cure = (
        "Make room, or name another folder: dir of teacher_placement, or COMPRESSKIT_CACHE. "
        "What is finished is kept."
    )
    return OutputError(Fault(str(folder), f"a folder with room for {expected}", got, cure))


def checksum(data: bytes) -> str:
    """Of contents in memory."""
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).hexdigest()


def file_checksum(path: Path, seen: Callable[[int], None] = lambda count: None) -> str:
    """Of a file, a block at a time; ``seen`` is told the bytes of each."""
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            seen(len(block))
    return digest.hexdigest()


def write_part(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write part ``number`` of the cache in ``folder``.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    data = save(dict(tensors))
    path = folder / PART.format(number, checksum(data))
    write_whole(path, data)
    return path


def find_part(folder: Path, number: int) -> Path | None:
    """Part ``number`` of the cache in ``folder``, if it is finished; its contents are not looked at."""
    return next(iter(sorted(folder.glob(PART.format(number, "*")))), None)


def require_sound(path: Path, seen: Callable[[int], None] = lambda count: None) -> None:
    """Check a part's contents against its name.

    Raises:
        DataError: they are other contents.
    """
    try:
        found = file_checksum(path, seen)
    except OSError as error:
        raise damaged(path, str(error)) from error
    if found != path.stem.rsplit("-", 1)[1]:
        raise damaged(path, f"{path.stat().st_size:,} bytes of another: it is damaged or cut short")


def damaged(path: Path, got: str, cure: str = "Delete this file: it is made again.") -> DataError:
    """The error of a file of a cache that is not what was written."""
    return DataError(Fault(str(path), "contents with the checksum they were written with", got, cure))


def _sync(folder: Path) -> None:
    """Put the names in ``folder`` on the disk too, where directories can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
