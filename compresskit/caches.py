"""What the user's caches hold, and how to be rid of it: ``compresskit cache ls`` and ``rm``.

Everything in them can be made again. Each kind of entry is checked by those who made it. An entry goes by one
rename: who opens it afterwards finds nothing, and not a part; who reads it at that moment may fail.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compresskit.errors import CompressKitError, Fault, InputError, OutputError
from compresskit.home import cache_home
from compresskit.registry import nearest

DAY_S = 24 * 3600.0
ASIDE = re.compile(r"^\..*\.(part|removed)$")
"""What a process leaves that is killed while it writes or removes an entry."""


@dataclass(frozen=True, slots=True)
class Cached:
    """One entry.

    Attributes:
        kind: a name of :data:`KINDS`.
        path: its file or folder.
        nbytes: on disk.
        made_s: when its newest file was written, in seconds since 1970.
    """

    kind: str
    path: Path
    nbytes: int
    made_s: float

    @property
    def name(self) -> str:
        """``kind/file``, by which it is removed."""
        return f"{self.kind}/{self.path.name}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What one folder of the caches is for.

    Attributes:
        says: what an entry saves one.
        folder: in the caches; empty is the caches' own folder.
        entry: names of entries; other files in the folder are not touched.
        fault: what is wrong with one, as a phrase; empty where it is whole.
    """

    says: str
    folder: str
    entry: re.Pattern[str]
    fault: Callable[[Path], str]


def _tokens_fault(path: Path) -> str:
    from compresskit.data.cache import read_entry

    return _reading(read_entry, path)


def _teacher_fault(path: Path) -> str:
    from compresskit.distill.cache.store import check_parts, read_report

    try:
        report = read_report(path)
        if report is not None:  # else it is not finished: the run that makes it continues it
            check_parts(path, report)
    except (CompressKitError, OSError) as error:
        return str(error)
    return ""


def _compiled_fault(path: Path) -> str:
    from compresskit.kernels.cache import content

    return "" if content(path) is not None else "other bytes than its checksum says"


def _costs_fault(path: Path) -> str:
    from compresskit.calibration.costs import read_entry

    return _reading(read_entry, path)


def _times_fault(path: Path) -> str:
    from compresskit.kernels.remembered import read_entry

    return _reading(read_entry, path)


def _json_fault(path: Path) -> str:
    return _reading(lambda path: json.loads(path.read_text(encoding="utf-8")), path)


def _reading(read: Callable[[Path], object], path: Path) -> str:
    """What is wrong with an entry that ``read`` reads; empty where it is whole."""
    try:
        read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return ""


def _model_fault(path: Path) -> str:
    return "" if (path / "config.json").is_file() else "no config.json"


HEX = re.compile(r"^[0-9a-f]{32,64}$")
TIMES = re.compile(r"^[0-9a-f]{32,64}\.json$")
KINDS = {
    "tokens": Kind("a data source as token ids", "", re.compile(r"^[0-9a-f]{40}$"), _tokens_fault),
    "teacher": Kind("what a teacher says of its rows", "teacher", HEX, _teacher_fault),
    "costs": Kind("what changing a layer costs a model", "costs", TIMES, _costs_fault),
    "kernels": Kind("a compiled kernel", "kernels", re.compile(r"^\w[^/]*\.[a-z]+$"), _compiled_fault),
    "choices": Kind("times of packed layouts", "choices", TIMES, _times_fault),
    "latency": Kind("times of candidate shapes", "latency", TIMES, _json_fault),
    "built": Kind("a model built from a config.json", "built", re.compile(r"^\w.*$"), _model_fault),
}


def cached(kinds: Iterable[str] = (), *, home: Path | None = None) -> list[Cached]:
    """All entries, the largest first.

    Args:
        kinds: names of :data:`KINDS`; none is all of them.
        home: the caches' folder; None is ``compresskit.home.cache_home``.

    Raises:
        InputError: there is no such kind.
    """
    home = home or cache_home()
    found = [entry for kind in _known(kinds) for entry in _entries(kind, home)]
    return sorted(found, key=lambda entry: (-entry.nbytes, entry.name))


def fault_of(entry: Cached) -> str:
    """What is wrong with ``entry``, as a phrase; empty where it is whole. All of it is read."""
    return KINDS[entry.kind].fault(entry.path)


def chosen(
    names: Iterable[str],
    *,
    older_than_days: float = 0.0,
    home: Path | None = None,
    now_s: float | None = None,
) -> list[Cached]:
    """Entries by their names.

    Args:
        names: kinds, or ``kind/file``, of which the first characters that tell it apart suffice.
        older_than_days: only those that were made so long ago.
        home: as for :func:`cached`.
        now_s: seconds since 1970; None is the clock's.

    Raises:
        InputError: a name is of no entry, or of several.
    """
    now_s = time.time() if now_s is None else now_s
    every = cached(home=home)
    found: dict[Path, Cached] = {}
    faults = []
    for name in names:
        kind, slash, file = name.partition("/")
        _known([kind])
        mine = [entry for entry in every if entry.kind == kind and entry.path.name.startswith(file)]
        whole = [entry for entry in mine if entry.path.name == file]
        if slash and len(whole or mine) != 1:
            got = f"{len(mine)} entries whose names begin so" if mine else "none"
            faults.append(Fault(name, "one entry of the caches", got, "See `compresskit cache ls`."))
        found |= {entry.path: entry for entry in (whole if slash and whole else mine)}
    if faults:
        raise InputError(*faults)
    return [entry for entry in found.values() if now_s - entry.made_s >= older_than_days * DAY_S]


def remove(entries: Iterable[Cached]) -> int:
    """Remove ``entries``; one that another process removed first is no fault. Returns bytes freed.

    Raises:
        OutputError: one cannot be removed; those before it are.
    """
    freed = 0
    for entry in entries:
        aside = entry.path.with_name(f".{entry.path.name}.{secrets.token_hex(4)}.removed")
        try:
            entry.path.rename(aside)
        except FileNotFoundError:
            continue
        except OSError as error:
            cure = "Give yourself the right to write there, or remove it by hand."
            raise OutputError(
                Fault(str(entry.path), "an entry that can be removed", str(error), cure)
            ) from error
        _delete(aside)
        freed += entry.nbytes
    return freed


def sweep(*, home: Path | None = None, now_s: float | None = None) -> int:
    """Remove what killed processes left half-written or half-removed a day ago. Returns bytes freed."""
    home, now_s = home or cache_home(), time.time() if now_s is None else now_s
    freed = 0
    for folder in sorted({home / kind.folder for kind in KINDS.values()}):
        for path in folder.glob(".*") if folder.is_dir() else ():
            size, made_s = _measured(path)
            if ASIDE.match(path.name) and now_s - made_s >= DAY_S:
                _delete(path)
                freed += size
    return freed


def _known(kinds: Iterable[str]) -> list[str]:
    """``kinds``, all of which there are; all where none is named."""
    kinds = list(kinds)
    if strange := [kind for kind in kinds if kind not in KINDS]:
        cure = "See `compresskit cache ls`."
        raise InputError(
            *(
                Fault(kind, ", ".join(KINDS), f"{kind!r} (nearest: {nearest(kind, KINDS)})", cure)
                for kind in strange
            )
        )
    return kinds or list(KINDS)


def _entries(kind: str, home: Path) -> Iterator[Cached]:
    folder = home / KINDS[kind].folder
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if KINDS[kind].entry.match(path.name):
            yield Cached(kind, path, *_measured(path))


def _measured(path: Path) -> tuple[int, float]:
    """Bytes of all files in ``path``, and when the newest was written; other processes may remove some."""
    size, newest = 0, 0.0
    for file in (path, *(path.rglob("*") if path.is_dir() else ())):
        try:
            state = file.lstat()
        except FileNotFoundError:
            continue
        size += state.st_size if not file.is_dir() else 0
        newest = max(newest, state.st_mtime)
    return size, newest


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
