"""Zeros of several stages of one chain: who promised them, and who would move them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compresskit.errors import Fault

if TYPE_CHECKING:
    from compresskit.stage import Outlook, Promise


def zeroed_layers(stage: Any, model: Outlook) -> tuple[str, ...]:
    """The layers of ``model`` whose zeros ``stage``, which has no faults for it, will promise."""
    zeroes = getattr(stage, "zeroes", False) and not stage.reshapes
    return tuple(stage.layers(model)) if zeroes else ()


def promised_layers(promises: Iterable[Promise]) -> tuple[str, ...]:
    """The layers whose zeros were promised."""
    return tuple(promise.layer for promise in promises if promise.kind == "zeros")


def moving_faults(
    stage: Any, layers: Iterable[str], zeroed: Mapping[str, tuple[str, ...]], where: str
) -> list[Fault]:
    """What is wrong with a stage whose zeros may move, where others have promised theirs.

    Args:
        stage: any.
        layers: that it makes zeros in.
        zeroed: who promised zeros -> in which layers.
        where: prefix of each fault.
    """
    faults: list[Fault] = []
    mine = set(layers) if getattr(stage, "regrows", False) else set()
    for name, theirs in zeroed.items():
        if met := [layer for layer in theirs if layer in mine]:
            got = f"{stage.kind} after {name}, whose zeros it would let grow, such as those of {met[0]}"
            cure = "Use method gradual, which keeps them, or put these layers into ignore."
            faults.append(Fault(f"{where}.method", "a method that keeps the zeros there are", got, cure))
    return faults
