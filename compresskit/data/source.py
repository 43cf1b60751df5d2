"""What a source's name stands for: files, a data set of the hub, or the standard library."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from compresskit.data.lines import bad
from compresskit.data.readers import READERS, kind_of
from compresskit.data.spec import STDLIB
from compresskit.data.stdlib import stdlib_files

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
MARKS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from.

    Attributes:
        kind: ``stdlib``, ``files`` or ``hub``.
        name: as the user gave it.
        train: files to train on; where ``validation`` is empty, validation is held out of these too.
        validation: files of a split of their own.
        left_out: files marked as a test split, which neither training nor validation may see.
    """

    kind: str
    name: str
    train: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read."""
        return self.train + self.validation


def mark_of(parts: tuple[str, ...]) -> str:
    """The split that a path's words name (``valid_head.jsonl``, ``train/01.txt``), or nothing."""
    words = [w for part in parts for w in re.split(r"[^a-z]+", part.lower())]
    return next((MARKS[word] for word in reversed(words) if word in MARKS), "")


def _divided(name: str, files: list[Path], root: Path) -> Source:
    marks = {path: mark_of(path.relative_to(root).parts) for path in files}
    if set(marks.values()) in ({"test"}, {"validation"}, {"test", "validation"}):
        return Source("files", name, tuple(files))  # nothing to train on otherwise: take the marks as names
    pick = {mark: tuple(p for p in files if marks[p] == mark) for mark in ("validation", "test")}
    train = tuple(p for p in files if marks[p] not in pick)
    return Source("files", name, train, pick["validation"], pick["test"])


def find_source(name: str) -> Source:
    """Find what ``name`` stands for, without reading any text.

    Args:
        name: ``stdlib:``, a file, a folder (read with its sub-folders), a glob, or a data set of the
            hub, ``owner/name`` or ``owner/name:configuration``.

    Raises:
        DataError: there is nothing of that name.
    """
    if name == STDLIB:
        return Source("stdlib", name, stdlib_files())
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
        found = [p for p in found if not any(x.startswith(".") for x in p.relative_to(path).parts)]
        if not found:
            kinds = " ".join(READERS)
            raise bad(name, f"files of kind {kinds}", "a folder with none", "Name the folder with the text.")
        return _divided(name, found, path)
    if path.exists():
        return Source("files", name, (path,))
    if glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            cure = "Check the pattern; quote it, or the shell expands it."
            raise bad(name, "a pattern that matches files", "no match", cure)
        root = Path(path.anchor)
        return _divided(name, found, root) if len(found) > 1 else Source("files", name, tuple(found))
    is_path = kind_of(path) or name.startswith((".", "/", "~")) or "\\" in name
    if is_path or not HUB_NAME.fullmatch(name):
        raise bad(name, "a file, a folder, a glob, a hub data set or stdlib:", *_absent(path))
    return Source("hub", name)


def _absent(path: Path) -> tuple[str, str]:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    near = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
    cure = f"Check the path; {parent.resolve()} holds: {', '.join(near) or 'nothing'}."
    return "no such file", cure
