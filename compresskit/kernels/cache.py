"""Compiled kernels on disk: made once per user, whole or not at all, and made again when damaged.

A file is what was made followed by its SHA-256, so that one rename publishes both; ELF readers do not mind
bytes after the end. Two processes that need the same file wait for each other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from compresskit.errors import Fault, OutputError
from compresskit.home import cache_home

DIGEST_BYTES = 32


def directory() -> Path:
    """Where compiled kernels are kept: ``kernels`` in COMPRESSKIT_CACHE, or in the user's own cache."""
    home = cache_home()
    return home / "kernels"


def key_of(*parts: str) -> str:
    """Sixteen hexadecimal digits that stand for all of ``parts``, their order and their borders."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()[:16]


def kept(name: str, make: Callable[[], bytes]) -> Path:
    """The file ``name`` of the cache; ``make`` gives its bytes where there is none, or a damaged one.

    Raises:
        OutputError: the directory cannot be written to.
    """
    path = directory() / name
    if content(path) is not None:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            if content(path) is None:
                _publish(path, make())
    except OSError as error:
        cure = "Set COMPRESSKIT_CACHE to a folder that can be written to."
        raise OutputError(
            Fault(str(path.parent), "a folder for compiled kernels", str(error), cure)
        ) from error
    return path


def content(path: Path) -> bytes | None:
    """What :func:`kept` was given for ``path``; None where it is missing or damaged."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    payload, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def _publish(path: Path, payload: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(payload + hashlib.sha256(payload).digest())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
