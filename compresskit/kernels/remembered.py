"""Times of layouts on disk: one file for each kind of layer, device and state of the kernels.

A file holds the whole key besides what it stands for, so that a name that two keys share does no harm, and
the SHA-256 of both; one that cannot be read, or was changed, is as good as none, and is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from compresskit.home import cache_home
from compresskit.kernels.contest import Times
from compresskit.kernels.packed.base import Case
from compresskit.timing import processor

FORMAT = 1
SOURCES = (".py", ".c", ".h", ".cu", ".cuh")
Key = Mapping[str, Any]


def key_of(case: Case, device: torch.device, more: Key) -> dict[str, Any]:
    """Everything that times depend on, as plain data: ``case``, the device, versions, and ``more``."""
    on_gpu = device.type == "cuda"
    plain = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in asdict(case).items()}
    key = {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "kernels": _kernels(),
        "case": plain,
        **more,
    }
    found: dict[str, Any] = json.loads(json.dumps(key))
    return found


def place() -> Path:
    """The directory of the files, in the user's cache."""
    return cache_home() / "choices"


def read(key: Key) -> tuple[Times, tuple[str, ...]] | None:
    """What :func:`write` kept under ``key``; None where there is nothing, or nothing whole."""
    try:
        said = read_entry(_path(key))
        if said["key"] != key:
            return None
        times = {
            str(name): {int(tokens): float(one) for tokens, one in ms.items()}
            for name, ms in said["times_ms"].items()
        }
        notes = tuple(str(note) for note in said["notes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = all(one > 0 for ms in times.values() for one in ms.values()) and "dense" in times
    return (times, notes) if whole else None


def read_entry(path: Path) -> dict[str, Any]:
    """What is in a file that :func:`write` made, without its checksum.

    Raises:
        ValueError: it is damaged; the message says how.
        OSError: it cannot be read.
    """
    said = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(said, dict) or said.pop("sha256", "") != _digest(said):
        raise ValueError("other contents than its checksum says")
    return said


def write(key: Key, times: Times, notes: tuple[str, ...]) -> tuple[str, ...]:
    """Keep ``times`` under ``key``; a reader finds the old file or the new one, never a part.

    Returns:
        A sentence where it could not be kept, so that the next process has to time again.
    """
    path = _path(key)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        said = json.loads(json.dumps({"key": key, "times_ms": times, "notes": list(notes)}))
        text = json.dumps({**said, "sha256": _digest(said)}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        return (f"Times of layouts could not be kept in {path.parent}: {error.strerror}.",)
    return ()


def _path(key: Key) -> Path:
    return place() / f"{_digest(key)[:32]}.json"


def _digest(said: Key) -> str:
    """SHA-256 of plain data, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@cache
def _kernels() -> str:
    """A digest of the source text of all kernels: another text, other times."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in SOURCES:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
