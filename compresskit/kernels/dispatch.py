"""Which implementation of each op runs on which device: one table that can be printed. No torch.

An implementation is a module ``compresskit/kernels/<implementation>/<op>.py`` with a function of the op's
name; ``reference`` runs everywhere and is the specification. The fastest comes first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from compresskit.errors import EngineError, Fault

OPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "linear_cross_entropy": {"cpu": ("reference",), "cuda": ("reference",)},
    "linear_divergence": {"cpu": ("reference",), "cuda": ("reference",)},
}

_used: dict[str, str] = {}


def choose(op: str, device: str) -> str:
    """The implementation of ``op`` for tensors on ``device``: ``cpu`` or ``cuda``.

    Raises:
        EngineError: there is none.
    """
    choices = OPS[op].get(device, ())
    if not choices:
        known = ", ".join(sorted(OPS[op]))
        raise EngineError(Fault(op, f"tensors on {known}", device, "Set device to one of these."))
    return choices[0]


def implementation(op: str, device: str) -> Callable[..., Any]:
    """The function that computes ``op`` on ``device``; which one it was is remembered for :func:`used`."""
    name = _used[op] = choose(op, device)
    function: Callable[..., Any] = getattr(import_module(f"compresskit.kernels.{name}.{op}"), op)
    return function


def forget() -> None:
    """Begin a new record for :func:`used`, so that it tells of one run and not of those before it."""
    _used.clear()


def used() -> dict[str, str]:
    """Op -> implementation, of the ops this process has run since :func:`forget`; goes into a record."""
    return dict(sorted(_used.items()))


def table() -> str:
    """The table as text: one line per op and device."""
    rows = [("op", "device", "implementations, best first")]
    rows += [(op, device, ", ".join(names)) for op, by in OPS.items() for device, names in by.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
