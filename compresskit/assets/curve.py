"""The loss curve of the bundled teacher: a table, a picture and the thinned figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 640, 320, 48, 36, 16
TABLE_ROWS = 13
POINTS = 200


def training_losses(records: Records) -> list[tuple[int, float]]:
    """Step and loss of each optimiser step."""
    return [(int(r["step"]), float(r["loss"])) for r in records if "loss" in r]


def validation_losses(records: Records) -> list[tuple[int, float]]:
    """Step and loss of each evaluation, the last one of a step counting."""
    return sorted(
        {int(r["step"]): float(r["validation_loss"]) for r in records if "validation_loss" in r}.items()
    )


def thinned(records: Records, points: int = POINTS) -> list[dict[str, float]]:
    """At most ``points`` means of the training loss, and every validation loss at its step."""
    losses = training_losses(records)
    size = max(1, math.ceil(len(losses) / points))
    groups = [losses[i : i + size] for i in range(0, len(losses), size)]
    found: list[dict[str, float]] = [
        {"step": group[-1][0], "training_loss": round(_mean(group), 5)} for group in groups
    ]
    found += [{"step": step, "validation_loss": round(loss, 5)} for step, loss in validation_losses(records)]
    return sorted(found, key=lambda point: (point["step"], "validation_loss" in point))


def _mean(group: Sequence[tuple[int, float]]) -> float:
    return sum(loss for _, loss in group) / len(group)


def loss_table(records: Records, rows: int = TABLE_ROWS) -> str:
    """A Markdown table: step, mean training loss since the row before, validation loss where taken."""
    losses, held_out = training_losses(records), dict(validation_losses(records))
    last = losses[-1][0]
    rows = min(rows, last)
    steps = sorted(
        {round(last * (i + 1) / rows) for i in range(rows)} | (held_out.keys() & {s for s, _ in losses})
    )
    lines = ["| step | training loss | validation loss |", "|---|---|---|"]
    before = 0
    for step in steps:
        group = [pair for pair in losses if before < pair[0] <= step]
        before = step
        validation = f"{held_out[step]:.3f}" if step in held_out else ""
        lines.append(f"| {step} | {_mean(group):.3f} | {validation} |")
    return "\n".join(lines)


def loss_svg(records: Records) -> str:
    """The curve as a picture of its own: training loss as a line, validation loss as dots."""
    curve = [(p["step"], p["training_loss"]) for p in thinned(records) if "training_loss" in p]
    dots = validation_losses(records)
    last = max(step for step, _ in curve)
    top = math.ceil(max(loss for _, loss in curve))
    floor = min(math.floor(min(loss for _, loss in [*curve, *dots])), top - 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - MARGIN) * step / last

    def y(loss: float) -> float:
        return MARGIN + (HEIGHT - BOTTOM - MARGIN) * (top - loss) / (top - floor)

    def text(left: float, baseline: float, body: str, anchor: str) -> str:
        return f'<text x="{left:.1f}" y="{baseline:.1f}" text-anchor="{anchor}">{body}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        "<title>Loss in nats per token over optimiser steps</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for loss in range(floor, top + 1):
        at = y(loss)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, at + 4, str(loss), "end"))
    for i in range(5):
        step = last * i / 4
        parts.append(text(x(step), HEIGHT - BOTTOM + 16, f"{step:.0f}", "middle"))
    path = "L".join(f"{x(step):.1f} {y(loss):.1f}" for step, loss in curve)
    parts.append(f'<path d="M{path}" fill="none" stroke="#2563a8" stroke-width="1.5"/>')
    parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="4" fill="#c2410c"/>' for s, v in dots]
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - 4, "step", "middle"))
    parts.append(
        text(
            WIDTH - MARGIN, MARGIN + 14, "line: training loss, dots: validation loss (nats per token)", "end"
        )
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
