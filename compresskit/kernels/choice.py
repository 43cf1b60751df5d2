"""Which layout multiplies: timed on this device for each kind of layer, dense among them, and remembered.

A layer is timed with inputs of few and of many tokens (``kernels/contest.py``). For each class of batches the
fastest layout is taken, and none that is slower than dense at either end of the class. Times are kept on disk
under all that they depend on (``kernels/remembered.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compresskit.errors import EngineError, Fault
from compresskit.kernels import dispatch, remembered
from compresskit.kernels.bitmap import Bitmap
from compresskit.kernels.contest import (
    COPIES_BYTES,
    DENSE,
    EXPANDED,
    LEFT_OUT,
    OVERHEAD_MS,
    Timer,
    Times,
    contest,
)
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Case
from compresskit.kernels.packed.block import SIDE, fills_blocks

BOUNDS = (1, 4, 16, 64)
CLASSES = ("1", "2-4", "5-16", "17-64", "65+")
ENDS = ((1,), (2, 4), (5, 16), (17, 64), (65, 1024))
"""Tokens at which each class is timed."""
RESIDENT = ("fastest", "packed")
USUAL = "fastest"
ALIKE = 1.05  # a second packed layout has to be faster than the first by more to be kept beside it
BUDGET_S = 30.0
STEP_FRACTION = 0.05
"""Layers whose shares of zeros round to the same multiple of this are of one kind."""

_known: dict[str, tuple[Times | None, tuple[str, ...]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user asks of the choice.

    Attributes:
        resident: ``fastest`` keeps the dense weight beside the packed one where dense wins a class;
            ``packed`` keeps one packed layout alone, the least memory, and may be slower than dense.
        layout: of every layer, in batches that it takes, whatever is faster; empty measures.
        budget_s: seconds for timing, over all kinds of layers.
        kinds: of layers, that share the budget.
        model_bytes: of all linear weights of the model, which are read between two readings of one.
        notes: sentences that every choice has to show.
    """

    resident: str = "fastest"
    layout: str = ""
    budget_s: float = BUDGET_S
    kinds: int = 1
    model_bytes: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if self.resident not in RESIDENT:
            cure = "Name one of them, or leave it out."
            faults.append(Fault("resident", " or ".join(RESIDENT), repr(self.resident), cure))
        if self.layout and self.layout not in LAYOUTS:
            cure = "Name one of them, or leave it out to have them timed."
            faults.append(Fault("layout", ", ".join(LAYOUTS), repr(self.layout), cure))
        if not self.budget_s >= 0:  # nor is NaN, which no time would reach
            cure = "Set COMPRESSKIT_CHOICE_SECONDS to a number of seconds, or take it away."
            faults.append(Fault("budget_s", "seconds, 0 or more", repr(self.budget_s), cure))
        if faults:
            raise EngineError(*faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How one layer multiplies.

    Attributes:
        steps: for each of :data:`CLASSES` a layout, perhaps with :data:`EXPANDED`.
        times_ms: what was measured; empty where a layout was asked for.
        notes: sentences that a report has to show.
    """

    steps: tuple[str, ...]
    times_ms: Times = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def at(self, tokens: int) -> str:
        """The step for so many tokens."""
        for step, most in zip(self.steps, BOUNDS, strict=False):  # no bisect: torch.compile does not trace it
            if tokens <= most:
                return step
        return self.steps[-1]

    @property
    def resident(self) -> tuple[str, ...]:
        """The layouts that have to be in memory."""
        return tuple(dict.fromkeys(step.removesuffix(EXPANDED) for step in self.steps))

    def __str__(self) -> str:
        if len(set(self.steps)) == 1:
            return self.steps[0]
        return ", ".join(f"{name}: {step}" for name, step in zip(CLASSES, self.steps, strict=True))


def wish_here(*, shortage: str = "", **given: Any) -> Wish:
    """A wish as given; what is not, as ``COMPRESSKIT_LAYOUT``, ``_RESIDENT`` and ``_CHOICE_SECONDS`` say.

    Args:
        shortage: why ``resident`` has to be ``packed`` where nobody says what it is to be; see
            ``compresskit.kernels.memory.shortage``.
        given: fields of the wish.

    Raises:
        EngineError: no such layout or policy, or seconds that are no number.
    """
    for name in ("layout", "resident"):
        if not given.get(name):
            given[name] = os.environ.get(f"COMPRESSKIT_{name.upper()}", "")
    if shortage and not given["layout"] and not given["resident"]:
        given.update(resident="packed", notes=(shortage,))
    given["resident"] = given["resident"] or USUAL
    if seconds := os.environ.get("COMPRESSKIT_CHOICE_SECONDS"):
        try:
            given.setdefault("budget_s", float(seconds))
        except ValueError as error:
            fault = Fault("COMPRESSKIT_CHOICE_SECONDS", "seconds", repr(seconds), "Set it to a number.")
            raise EngineError(fault) from error
    return Wish(**given)


def kind_of(weight: Bitmap, inputs: torch.dtype, group: tuple[int, int] | None, device: torch.device) -> Case:
    """The case that stands for all layers alike: zeros are rounded."""
    return Case(
        out_features=weight.out_features,
        in_features=weight.in_features,
        values=weight.values_K.dtype,
        inputs=inputs,
        zero_fraction=round(round(weight.zero_fraction / STEP_FRACTION) * STEP_FRACTION, 2),
        group=group,
        block=(SIDE, SIDE) if device.type == "cuda" and fills_blocks(weight) else None,
        device=device.type,
    )


def choose(
    weight: Bitmap,
    *,
    inputs: torch.dtype,
    device: torch.device,
    group: tuple[int, int] | None = None,
    wish: Wish | None = None,
    timer: Timer | None = None,
) -> Choice:
    """How ``weight`` is to be multiplied on ``device``.

    Args:
        weight: without a fault.
        inputs: type of the inputs.
        device: to compute on.
        group: (N, M) where no M consecutive inputs keep more than N.
        wish: of the user; None is :func:`wish_here`.
        timer: how products are timed; None takes turns with the clock of this machine.

    Returns:
        The choice. Times come from this process or the disk where they are known there.

    Raises:
        EngineError: the layout asked for cannot multiply such a layer; it says why.
    """
    wish = wish_here() if wish is None else wish
    case = kind_of(weight, inputs, group, device)
    exact = replace(case, zero_fraction=weight.zero_fraction)
    if wish.layout:
        return _forced(exact, wish.layout)
    expanded = wish.resident == "packed"
    # Larger models than the copies can fill are all alike.
    read = min(wish.model_bytes, COPIES_BYTES.get(device.type, 0))
    more = {"expanded": expanded, "bytes": read.bit_length(), **_kernels_of(weight, device)}
    key = remembered.key_of(case, device, more)
    text = json.dumps(key, sort_keys=True)
    if text not in _known:
        _known[text] = remembered.read(key) or (None, ())
    times, notes = _known[text]
    if times is None:
        points = tuple(tokens for ends in ENDS for tokens in ends)
        share = wish.budget_s / max(1, wish.kinds)
        times, notes = contest(
            weight,
            exact,
            points,
            device=device,
            budget_s=share,
            model_bytes=read,
            expanded=expanded,
            timer=timer,
        )
        _known[text] = times, notes
        # What was cut short or failed is timed again by the next process, which may have longer, or more.
        if all(tokens in times[DENSE] for tokens in points) and not any(LEFT_OUT in one for one in notes):
            notes += remembered.write(key, times, notes)
    return decide(times, wish.resident, (*notes, *wish.notes))


def decide(times: Times, resident: str = "fastest", notes: tuple[str, ...] = ()) -> Choice:
    """The choice that follows from ``times``; see :class:`Wish`. Without any it is dense."""
    if resident == "packed":
        steps = _packed_steps(times)
    else:
        steps = _fastest_steps({name: ms for name, ms in times.items() if not name.endswith(EXPANDED)})
    return Choice(steps=steps, times_ms=times, notes=notes)


def table(choices: Mapping[str, Choice]) -> str:
    """Choices by the name of the layer as text: layers alike in a row, the times that decided below."""
    alike: dict[Choice | tuple[Any, ...], list[str]] = {}
    for name, choice in choices.items():
        alike.setdefault((choice.steps, json.dumps(choice.times_ms, sort_keys=True)), []).append(name)
    lines = []
    for names in alike.values():
        choice = choices[names[0]]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {choice}")
        for way, ms in choice.times_ms.items():
            said = ", ".join(f"{tokens}: {one:.4g}" for tokens, one in sorted(ms.items()))
            lines.append(f"    {way}, ms by tokens: {said}")
    notes = dict.fromkeys(note for choice in choices.values() for note in choice.notes)
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _kernels_of(weight: Bitmap, device: torch.device) -> dict[str, Any]:
    """What computes each layout here, and by which scales; what cannot be had is noted for the report."""
    return {
        "by": {name: dispatch.choose(LAYOUTS[name]().op, device.type) for name in LAYOUTS},
        "path": os.environ.get("COMPRESSKIT_CPU_PATH", ""),
        "groups": 0 if weight.scales_OG is None else weight.scales_OG.shape[1],
    }


def _forced(case: Case, name: str) -> Choice:
    layout = LAYOUTS[name]()
    if why := layout.refusal(case):
        cure = "Ask for another layout, or for none to have them timed."
        what = f"a layer of {case.out_features}x{case.in_features}, {case.zero_fraction:.0%} zeros"
        raise EngineError(
            Fault(f"layout {name}", f"one that multiplies by {what}", f"a refusal: {why}", cure)
        )
    refused = [any(layout.refusal(replace(case, tokens=tokens)) for tokens in ends) for ends in ENDS]
    notes = (f"Layout {name} takes no larger batches: those are dense.",) if any(refused) else ()
    return Choice(steps=tuple(DENSE if no else name for no in refused), notes=notes)


def _fastest_steps(times: Times) -> tuple[str, ...]:
    """The fastest of each class; a second packed layout only where it is worth its memory."""
    steps = [_best(times, ends, [n for n in times if n != DENSE]) for ends in ENDS]
    first = next((step for step in steps if step != DENSE), DENSE)
    for index, ends in enumerate(ENDS):
        if steps[index] not in (DENSE, first) and _wins(times, first, ends):
            ratio = max(times[first][tokens] / times[steps[index]][tokens] for tokens in ends)
            steps[index] = first if ratio <= ALIKE else steps[index]
    return tuple(steps)


def _best(times: Times, ends: Iterable[int], names: Iterable[str]) -> str:
    ends = tuple(ends)
    winners = [name for name in names if _wins(times, name, ends)]
    return min(winners, key=lambda name: sum(times[name][tokens] for tokens in ends), default=DENSE)


def _wins(times: Times, name: str, ends: Iterable[int]) -> bool:
    """Whether ``name`` is faster than dense at every end of a class."""
    mine, dense = times.get(name, {}), times.get(DENSE, {})
    return all(t in mine and t in dense and mine[t] + OVERHEAD_MS <= dense[t] for t in ends)


def _packed_steps(times: Times) -> tuple[str, ...]:
    """The packed layout that is fastest for one token, multiplying or made dense as either is faster."""
    names = [name for name in times if name != DENSE and not name.endswith(EXPANDED) and 1 in times[name]]
    if not names:
        return (DENSE,) * len(CLASSES)
    first = min(names, key=lambda name: times[name][1])
    made = times.get(first + EXPANDED, {})
    steps, slow = [], False
    for ends in ENDS:
        both = all(t in made and t in times[first] for t in ends)
        # What was not tried on so many tokens had been hopeless on fewer.
        slow = slow or (any(t not in times[first] for t in ends) and bool(made))
        expanded = slow or (both and sum(made[t] for t in ends) < sum(times[first][t] for t in ends))
        steps.append(first + EXPANDED if expanded else first)
    return tuple(steps)
