"""Checkpoints that a restart continues from: complete or ignored.

Engines write many files at their own pace. A checkpoint counts only once ``complete.json`` stands in it,
which is written last, after everything else has reached the disk, and lists every file with its size.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

MARK = "complete.json"
TRAINED = "trained.safetensors"
PREFIX = "checkpoint-"


def seal(checkpoint: Path, identity: str) -> None:
    """Declare ``checkpoint`` complete; ``identity`` says which run it belongs to."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARK]
    for path in files:
        _flush(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    partial = checkpoint / (MARK + ".partial")
    partial.write_text(json.dumps({"identity": identity, "files": sizes}, sort_keys=True), encoding="utf-8")
    _flush(partial)
    os.replace(partial, checkpoint / MARK)
    _flush(checkpoint)


def latest(folder: Path, identity: str) -> Path | None:
    """The complete checkpoint of the latest step that belongs to ``identity``; None if there is none."""
    return max((c for c in _all(folder) if _is_whole(c, identity)), key=step_of, default=None)


def lacks(folder: Path, identity: str, step: int) -> bool:
    """Whether there is something to keep after ``step``, and no complete checkpoint of it."""
    last = latest(folder, identity)
    return step > 0 and (last is None or step_of(last) < step)


def step_of(checkpoint: Path) -> int:
    """The optimiser step ``checkpoint`` was taken after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def sweep(folder: Path, keep: Path | None) -> None:
    """Remove every checkpoint but ``keep``: older, half-written, or of another run."""
    for checkpoint in _all(folder):
        if checkpoint != keep:
            (checkpoint / MARK).unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    found = folder.glob(PREFIX + "*") if folder.is_dir() else ()
    return [path for path in found if path.name.removeprefix(PREFIX).isdigit()]


def _is_whole(checkpoint: Path, identity: str) -> bool:
    try:
        mark = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        return mark["identity"] == identity and all(
            (checkpoint / name).stat().st_size == size for name, size in mark["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
