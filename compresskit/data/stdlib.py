"""The ``stdlib:`` corpus: the source text of the running Python's own standard library.

It is on every machine, needs no network and is real text: about 570 files and 10 MB.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from compresskit.errors import DataError, Fault

EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "idle_test", "lib2to3", "pydoc_data", "site-packages"}
    | {"test", "testdata", "tests", "turtledemo"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")  # facts of one build, not source text


def stdlib_root() -> Path:
    """The folder of the running Python's standard library (a virtual environment's base)."""
    return Path(sysconfig.get_path("stdlib"))


def held_out(key: bytes, fraction: float) -> bool:
    """Whether a document is in the validation split.

    Args:
        key: what identifies the document: its relative path, or its text.
        fraction: of the documents that are held out, in [0, 1].

    Returns:
        The same answer on every machine; raising ``fraction`` only adds documents.
    """
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < fraction * 2**64


def _sources(folder: Path) -> Iterator[Path]:
    """The corpus' files under ``folder``; a folder left out is not entered: site-packages is large."""
    for path in folder.iterdir():
        if path.is_dir():
            # A folder that is no importable name (config-3.11-x86_64-linux-gnu) holds build products.
            if path.name.isidentifier() and path.name not in EXCLUDED_FOLDERS:
                yield from _sources(path)
        elif path.suffix == ".py" and not path.name.startswith(EXCLUDED_PREFIXES) and path.stat().st_size:
            yield path


def stdlib_files(root: Path | None = None) -> tuple[Path, ...]:
    """The corpus' files that are not empty, sorted by relative path.

    Args:
        root: the library's folder; that of the running Python by default.

    Raises:
        DataError: there is no source text, as in a Python shipped without its ``.py`` files.
    """
    root = root or stdlib_root()
    kept = sorted((p.relative_to(root).as_posix(), p) for p in _sources(root))
    if not kept:
        raise DataError(
            Fault(
                where=f"stdlib: ({root})",
                expected="the .py files of Python's standard library",
                got="none",
                cure="Use a Python that ships its library as source, or name another data source.",
            )
        )
    return tuple(p for _, p in kept)


def stdlib_split(split: str, fraction: float, root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """The relative path and the file of each document of a split.

    Args:
        split: ``train``, ``validation`` or ``all``.
        fraction: of the files that are held out for validation, by a hash of the relative path.
        root: the library's folder; that of the running Python by default.
    """
    root = root or stdlib_root()
    for path in stdlib_files(root):
        relative = path.relative_to(root).as_posix()
        if split == "all" or held_out(relative.encode(), fraction) == (split == "validation"):
            yield relative, path
