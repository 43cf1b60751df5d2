"""A forecast for people: a table a stage, the best way on top, and what it consists of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compresskit.foresight.candidates import Row
from compresskit.foresight.devices import RESERVED_FRACTION
from compresskit.foresight.forecast import Forecast, Foresight, settings
from compresskit.progress import size
from compresskit.training.rules.asynchronous import EVERY_STEP

SAID = {
    "weights": "that it computes with, in fp32 as always while it trains",
    "masters": "the engine's own copy of what it steps",
    "gradients": "of what is trained",
    "optimiser": "its states",
    "activations": "kept for the backward pass, and what a block makes",
    "loss": "logits of some tokens at a time",
    "teacher": "its weights, and what it says of a batch",
    "gathered": "weights that are whole while a block computes",
    "buffers": "of communication, or of the optimiser's step",
    "frozen": "weights in few bits",
    "masks": "masks, and copies of weights that are rounded",
    "synchronise": "outer weights, their momentum, sums under way; or columns that are stepped at once",
}
"""What a term is, for people."""
FORM = "{:<18} {:<10} {:<9} {:>5} {:>7} {:>11} {:>9} {:>11}  {}"


def told(foresight: Foresight) -> str:
    """The whole forecast as text."""
    machine = foresight.machine
    device = machine.device
    head = (
        f"{machine.nodes} x {machine.gpus} {device.name}, {size(machine.usable_bytes)} each for tensors "
        f"({100 * RESERVED_FRACTION:.0f}% of {size(device.memory_bytes)} left to others), "
        f"{100 * device.efficiency:.0f}% of the peak"
    )
    if machine.nodes > 1:
        head += f", {8 * machine.link_bytes_s / 1e9:,.0f} Gbit/s between nodes"
    parts = [head, *(_stage(one, foresight) for one in foresight.forecasts), *foresight.notes]
    return "\n".join(parts)


def _stage(one: Forecast, foresight: Foresight) -> str:
    stage, model = one.subject.stage, one.subject.model
    lines = [
        "",
        f"{one.subject.name}: {model.anatomy.num_parameters:,} parameters, {stage.batch_size} rows of "
        f"{one.subject.tokens} tokens a step, {stage.precision}{_seldom(stage)}",
        FORM.format("strategy", "recompute", "teacher", "rows", "passes", "peak", "step", "tokens/s", ""),
    ]
    lines += [_line(row) for row in shown(one.rows)]
    if left := len(one.rows) - len(shown(one.rows)):
        lines.append(f"and {left} more, which --json tells")
    chosen = one.best
    if chosen is None:
        least = min((r.peak.bytes for r in one.rows if r.peak), default=None)
        lines.append(
            "Every way is refused, for the reason beside it."
            if least is None
            else f"Nothing fits; the least is {size(least)}. Use more or larger devices, or shorter rows."
        )
    else:
        lines += _explained(chosen, stage)
    return "\n".join([*lines, *one.notes])


def _seldom(stage: Any) -> str:
    """How often ranks exchange, where they do not at every step."""
    if stage.synchronise == EVERY_STEP:
        return ""
    late = f", {stage.synchronise_delay} late" if stage.synchronise_delay else ""
    return f", {stage.synchronise} every {stage.synchronise_every} steps{late}"


def shown(rows: Iterable[Row]) -> list[Row]:
    """Of what fits the best row of each way; of a strategy of which nothing fits one row, the first."""
    rows = list(rows)
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.fits:
            found.setdefault(_way(row), row)
    some = {way[0] for way in found}
    for row in rows:
        if row.combination.strategy not in some:
            found.setdefault((row.combination.strategy,), row)
    return list(found.values())


def _way(row: Row) -> tuple[str, ...]:
    way = row.combination
    return way.strategy, way.checkpointing, way.placement


def _line(row: Row) -> str:
    way = row.combination
    first = (way.strategy, way.checkpointing, way.placement or "-", way.rows, row.passes or "-")
    if row.refused:
        return FORM.format(way.strategy, *("-",) * 7, f"refused: {row.refused}")
    assert row.peak is not None
    assert row.pace is not None
    word = "" if row.fits else "too large"
    pace = f"{row.pace.total_s:,.3g} s"
    return FORM.format(*first, size(row.peak.bytes), pace, f"{row.pace.tokens_s:,.0f}", word)


def _explained(row: Row, stage: Any) -> list[str]:
    """The recommended row, term by term, and what to write for it."""
    assert row.peak is not None
    assert row.pace is not None
    fields = settings(row, stage)
    written = ", ".join(f"{name}: {_yaml(value)}" for name, value in fields.items())
    lines = [
        f"Recommended: {written or 'what the recipe says'}",
        f"  most is held at {row.peak.name!r}, in each process:",
    ]
    for name, count in row.peak.terms.items():
        if round(count):
            lines.append(f"  {name:<12} {size(round(count)):>10}  {SAID[name]}")
    pace = row.pace
    lines.append(
        f"  a step: {pace.compute_s:.3g} s of computing, {pace.communication_s:.3g} s of communication, of "
        f"which {pace.exposed_s:.3g} s show, {pace.step_s:.3g} s of the optimiser"
    )
    return lines


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
