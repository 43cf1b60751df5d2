"""One thing that does not combine when training. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compresskit.training.setting import Setting
from compresskit.training.trainable import ADAPTERS


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that does not combine.

    Attributes:
        name: short and stable; tests go by it.
        field: the field a user would change.
        broken: whether the rule is broken.
        expected: what would have been right.
        got: what was found, as a format string over the fields.
        cure: what to change.
    """

    name: str
    field: str
    broken: Callable[[Setting], bool]
    expected: str
    got: str
    cure: str


def swaps_layers(s: Setting) -> bool:
    """Whether layers compute with something else than their weight while they train."""
    return (
        getattr(s.fields, "kind", "") in ("qat", "qlora")
        or getattr(s.fields, "swaps_layers", False)
        or adapter_of(s.fields) != ""
    )


def adapter_of(stage: object) -> str:
    """The adapter that ``stage`` trains on a frozen model; empty where it trains none."""
    named = str(getattr(stage, "adapter", "") or getattr(stage, "trainable", ""))
    return named if named in ADAPTERS else ""
