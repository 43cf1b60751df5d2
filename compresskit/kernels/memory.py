"""What memory a device has left, what of a model fits into it, and freed memory given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
HIERARCHIES = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""Control groups of version 2 and of 1: controller -> folder, limit, use, how keys of memory.stat begin."""
DROPPED = ("active_file", "inactive_file")
"""Pages of files, that the system drops when memory is short."""
HEADROOM = 1.1
"""Of what the weights take: a layer's copies while it is packed, and inputs and outputs afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a model asks of a device.

    Attributes:
        device: its name.
        free_bytes: that it has left; None where nobody knows.
        packed_bytes: of the packed weights.
        dense_bytes: of the same weights, dense.
        other_bytes: of everything else that has yet to come to the device.
    """

    device: str
    free_bytes: int | None
    packed_bytes: int
    dense_bytes: int
    other_bytes: int = 0


def shortage(demands: Iterable[Demand]) -> str:
    """Why dense weights cannot be kept beside the packed ones, as a note; empty where they can."""
    for one in demands:
        both = one.packed_bytes + one.dense_bytes + one.other_bytes
        if one.free_bytes is not None and both * HEADROOM > one.free_bytes:
            return (
                f"{one.device} has {one.free_bytes / 1e9:.2f} GB free, and the model with its packed weights "
                f"dense beside them takes {both / 1e9:.2f} GB: only packed ones are kept, which may be "
                f"slower than dense for many tokens. To keep both, ask for resident='fastest' or set "
                f"COMPRESSKIT_RESIDENT=fastest."
            )
    return ""


def free_bytes(device: torch.device) -> int | None:
    """What ``device`` has left for this process; None where that cannot be asked."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    try:
        limited = group_free_bytes(MEMBERSHIP.read_text(encoding="utf-8"), GROUPS)
    except OSError:  # no control groups here
        return free
    return free if limited is None else min(free, limited)


def group_free_bytes(membership: str, root: Path) -> int | None:
    """What the control groups of a process leave it, pages of files that can be dropped among it.

    Args:
        membership: the text of ``/proc/self/cgroup``.
        root: where the groups are mounted.

    Returns:
        The least over its groups and those around them; None where none has a limit that can be read.
    """
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in {*controllers.split(",")} & {*HIERARCHIES}:
            folder, limit, used, prefix = HIERARCHIES[controller]
            top = root / folder
            group = top / path.lstrip("/")
            for place in (group, *group.parents):
                found.append(_left(place / limit, place / used, place / "memory.stat", prefix))
                if place == top:
                    break
    return min((one for one in found if one is not None), default=None)


def _left(limit: Path, used: Path, stat: Path, prefix: str) -> int | None:
    """Of one group; None where it has no limit."""
    try:
        most = int(limit.read_text(encoding="ascii"))
        taken = int(used.read_text(encoding="ascii"))
        lines = dict(line.split(" ", 1) for line in stat.read_text(encoding="ascii").splitlines())
        return max(0, most - taken + sum(int(lines.get(prefix + key, 0)) for key in DROPPED))
    except (OSError, ValueError):  # no such group in this namespace, or the word "max"
        return None


def give_back() -> None:
    """Return to the system what malloc keeps of memory that was freed, where it is glibc's.

    glibc takes blocks of up to 32 MB from its heap once a block of that size has been freed, and keeps the
    holes: after packing layers these are more than the packed weights. Elsewhere this does nothing.
    """
    trim = _trimmer()
    if trim is not None:
        trim(0)


@cache
def _trimmer() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None where there is none."""
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows takes no None
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    trim: Callable[[int], int] = found
    return trim
