"""Checkpoints that a restart continues from: complete or ignored.

Engines write many files at their own pace. A checkpoint counts only once ``complete.json`` stands in it,
which is written last, after everything else has reached the disk, and lists every file with its size. The one
before is kept as well, for the day that the last is found damaged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from compresskit.errors import CheckpointError, Fault
from compresskit.progress import size

MARK = "complete.json"
TRAINED = "trained.safetensors"
PREFIX = "checkpoint-"
WRITING = (OSError, RuntimeError, SafetensorError, CheckpointException)
"""Errors of what writes files, and of other things too."""
DISK = ("inline_container", "PytorchStreamWriter", "No space left", "iostream")
"""Words in RuntimeErrors of torch that could not write a file."""
SAID = 300
"""Characters that are told of the last of an error."""


def seal(
    checkpoint: Path, identity: str, carried: Mapping[str, Any] | None = None, names: Sequence[str] = ()
) -> None:
    """Declare ``checkpoint`` complete.

    Args:
        checkpoint: all of whose files are written.
        identity: which run it belongs to.
        carried: how that was carried out.
        names: of the parameters whose states the optimiser saved by number.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARK]
    for path in files:
        _flush(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    partial = checkpoint / (MARK + ".partial")
    mark = {"identity": identity, "files": sizes, "carried": dict(carried or {}), "names": list(names)}
    partial.write_text(json.dumps(mark, sort_keys=True), encoding="utf-8")
    _flush(partial)
    os.replace(partial, checkpoint / MARK)
    _flush(checkpoint)


def mark_of(checkpoint: Path) -> dict[str, Any]:
    """What :func:`seal` wrote of a complete one."""
    found: dict[str, Any] = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    return found


def latest(folder: Path, identity: str) -> Path | None:
    """The complete checkpoint of the latest step that belongs to ``identity``; None if there is none."""
    return max((c for c in _all(folder) if _is_whole(c, identity)), key=step_of, default=None)


def damaged_after(folder: Path, identity: str, start: Path | None) -> list[str]:
    """Names of checkpoints of this run later than ``start`` that were complete once and are not now.

    One without its mark was never complete: a kill in the middle of it is no damage.
    """
    step = step_of(start) if start else 0
    marked = [c for c in _all(folder) if step_of(c) > step and (c / MARK).is_file()]
    ours = [c for c in marked if _identity(c) in (None, identity)]
    return [c.name for c in sorted(ours, key=step_of) if not _is_whole(c, identity)]


@contextmanager
def written(checkpoint: Path) -> Iterator[None]:
    """While it is written: a full disk, or any other that fails, is told, and what was written is removed.

    Raises:
        CheckpointError: it could not be written; the one before is as it was.
    """
    with disk_told(checkpoint, "a checkpoint on the disk", checkpoint.parent):
        try:
            yield
        except WRITING as error:
            if _is_of_the_disk(error):
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise


@contextmanager
def disk_told(path: Path, expected: str, folder: Path) -> Iterator[None]:
    """While ``path`` is written: a full disk, or any other that fails, is told.

    Args:
        path: that is written.
        expected: what it is, in words.
        folder: of the checkpoints, at the last of which the same command goes on.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        yield
    except WRITING as error:
        if not _is_of_the_disk(error):
            raise
        free = shutil.disk_usage(path.parent).free
        got = f"{' '.join(str(error).split())[-SAID:]} ({size(free)} are free now)"
        before = max((c for c in _all(folder) if _is_whole(c, None)), key=step_of, default=None)
        kept = f"goes on after step {step_of(before)}" if before else "begins anew"
        cure = f"Free some disk, or choose another place; the same command {kept}."
        raise CheckpointError(Fault(str(path), expected, got, cure)) from error


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether ``error`` tells that a file could not be written, and not that another rank is gone."""
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in DISK)
    return not isinstance(error, ConnectionError | TimeoutError)


def lacks(folder: Path, identity: str, step: int) -> bool:
    """Whether there is something to keep after ``step``, and no complete checkpoint of it."""
    last = latest(folder, identity)
    return step > 0 and (last is None or step_of(last) < step)


def step_of(checkpoint: Path) -> int:
    """The optimiser step ``checkpoint`` was taken after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def discard(checkpoint: Path) -> None:
    """Remove it, if it is there: first the mark, so that a kill leaves no half of it that looks complete."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def sweep(folder: Path, identity: str, *, keep: int) -> None:
    """Remove checkpoints that are older, half-written, or of another run.

    Args:
        folder: where they are.
        identity: of the run.
        keep: so many of its latest complete ones stay.
    """
    whole = sorted((c for c in _all(folder) if _is_whole(c, identity)), key=step_of)
    for checkpoint in _all(folder):
        if checkpoint not in whole[-keep:]:
            discard(checkpoint)


def _all(folder: Path) -> list[Path]:
    found = folder.glob(PREFIX + "*") if folder.is_dir() else ()
    return [path for path in found if path.name.removeprefix(PREFIX).isdigit()]


def _identity(checkpoint: Path) -> str | None:
    """Of the run it says that it belongs to; None if it cannot be read."""
    try:
        return str(mark_of(checkpoint)["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(checkpoint: Path, identity: str | None) -> bool:
    """Whether it is complete, and of the run ``identity``; None is any."""
    try:
        mark = mark_of(checkpoint)
        return identity in (None, mark["identity"]) and all(
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
