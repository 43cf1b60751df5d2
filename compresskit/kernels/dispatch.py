"""Which implementation of each op runs on which device: one table that can be printed. No torch.

An implementation is a module ``compresskit/kernels/<implementation>/<op>.py`` with a function of the op's
name; ``reference`` runs everywhere and is the specification. The fastest comes first. Where the package
``compresskit.kernels.<implementation>`` has a function ``refusal(op)``, it says, as a phrase, why the
implementation cannot be had on this machine; it is then passed over, with a warning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from compresskit.errors import EngineError, Fault

OPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "linear_cross_entropy": {"cpu": ("reference",), "cuda": ("reference",)},
    "linear_divergence": {"cpu": ("reference",), "cuda": ("reference",)},
    "bitmap_linear": {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
    "bitmap_expand": {"cpu": ("cpu", "reference"), "cuda": ("reference",)},
    "bitmap_gradient": {"cpu": ("reference",), "cuda": ("reference",)},
    "two_four_linear": {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
    "two_four_expand": {"cpu": ("cpu", "reference"), "cuda": ("reference",)},
    "two_four_gradient": {"cpu": ("reference",), "cuda": ("reference",)},
    "block_linear": {"cpu": ("reference",), "cuda": ("triton", "reference")},
    "block_expand": {"cpu": ("reference",), "cuda": ("reference",)},
    "dense_linear": {"cpu": ("reference",), "cuda": ("reference",)},
    "fragment_linear": {"cpu": ("reference",), "cuda": ("cuda", "reference")},
    "fragment_expand": {"cpu": ("reference",), "cuda": ("reference",)},
    "gap_linear": {"cpu": ("reference",), "cuda": ("cuda", "reference")},
    "gap_expand": {"cpu": ("reference",), "cuda": ("reference",)},
    "tile_linear": {"cpu": ("reference",), "cuda": ("cuda", "reference")},
    "tile_expand": {"cpu": ("reference",), "cuda": ("cuda", "reference")},
}

_used: dict[str, str] = {}
_passed_over: dict[str, None] = {}


def choose(op: str, device: str) -> str:
    """The first implementation of ``op`` for tensors on ``device``, ``cpu`` or ``cuda``, that can be had.

    Raises:
        EngineError: there is none.
    """
    choices = OPS[op].get(device, ())
    if not choices:
        known = ", ".join(sorted(OPS[op]))
        raise EngineError(Fault(op, f"tensors on {known}", device, "Set device to one of these."))
    for name in choices:
        why = refusal(name, op)
        if not why:
            return name
        note(f"{op} does without its {name} implementation, which would be faster: {why}.")
    raise EngineError(
        Fault(op, f"one of {', '.join(choices)} on {device}", "none of them", "See the warnings.")
    )


@cache
def refusal(name: str, op: str) -> str:
    """Why the implementation called ``name`` of ``op`` cannot be had here; empty where it can."""
    said: str = getattr(import_module(f"compresskit.kernels.{name}"), "refusal", _none)(op)
    return said


def implementation(op: str, device: str) -> Callable[..., Any]:
    """The function that computes ``op`` on ``device``; which one it was is remembered for :func:`used`."""
    name = _used[op] = choose(op, device)
    function: Callable[..., Any] = getattr(import_module(f"compresskit.kernels.{name}.{op}"), op)
    return function


def forgo(op: str, name: str, why: str) -> Callable[..., Any]:
    """The function that specifies ``op``, where the implementation called ``name`` fails after all; noted."""
    note(f"{op} does without its {name} implementation, which would be faster: {why}.")
    _used[op] = "reference"
    return reference(op)


def reference(op: str) -> Callable[..., Any]:
    """The function that specifies ``op``."""
    function: Callable[..., Any] = getattr(import_module(f"compresskit.kernels.reference.{op}"), op)
    return function


def forget() -> None:
    """Begin a new record for :func:`used` and :func:`passed_over`: of one run, not of those before it."""
    _used.clear()
    _passed_over.clear()


def used() -> dict[str, str]:
    """Op -> implementation, of the ops this process has run since :func:`forget`; goes into a record."""
    return dict(sorted(_used.items()))


def passed_over() -> tuple[str, ...]:
    """A sentence for each implementation that could not be had since :func:`forget`; for records."""
    return tuple(_passed_over)


def note(sentence: str) -> None:
    """Keep ``sentence`` for :func:`passed_over`, and warn of it when it is new."""
    if sentence not in _passed_over:
        _passed_over[sentence] = None
        warnings.warn(sentence, stacklevel=4)


def _none(op: str) -> str:
    return ""


def table() -> str:
    """The table as text: one line per op and device."""
    rows = [("op", "device", "implementations, best first")]
    rows += [(op, device, ", ".join(names)) for op, by in OPS.items() for device, names in by.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
