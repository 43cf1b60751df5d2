"""A map of what a stage did to each layer: blocks from left to right, the layers of a block downwards."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compresskit.reports.svg import picture, text_at

Json = Any

CELL_H = 26
GAP = 3
TEXT_W = 40  # narrower cells carry no figure, only their colour
MAX_CELL_W = 72
PICTURE_W = 1000
FAINTEST = 0.07  # opacity of the least value, so that a cell is seen to be there
STRONG = 0.68  # from here on text in a cell takes the colour that reads on a full one


@dataclass(frozen=True, slots=True)
class Map:
    """The layers of one stage as a grid.

    Attributes:
        rows: what the layers of one block are called.
        columns: the blocks' numbers; ``""`` for layers outside any block.
        cells: (row, column) -> the layer's record.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Mapping[str, Json]]


def layer_map(layers: Sequence[Mapping[str, Json]]) -> Map:
    """Arrange ``layers`` by the number in their names: ``model.layers.3.mlp.up_proj`` is block 3."""
    placed: dict[tuple[str, str], Mapping[str, Json]] = {}
    for layer in layers:
        match = re.match(r"^.*?\.?(\d+)\.(.+)$", layer["name"])
        block, tail = (match.group(1), match.group(2)) if match else ("", layer["name"])
        placed[tail, block] = layer
    tails = list(dict.fromkeys(tail for tail, _ in placed))
    short = {tail: tail.rpartition(".")[2] for tail in tails}
    names = short if len(set(short.values())) == len(tails) else {tail: tail for tail in tails}
    blocks = sorted({block for _, block in placed}, key=lambda b: (b == "", int(b or 0)))
    return Map(
        rows=tuple(names[tail] for tail in tails),
        columns=tuple(blocks),
        cells={(names[tail], block): layer for (tail, block), layer in placed.items()},
    )


def heat(caption: str, layers: Sequence[Mapping[str, Json]], key: str, kind: str) -> str:
    """The picture of one value of each layer.

    Args:
        caption: shown above it, and its name for screen readers.
        layers: records of one stage; those without the value are left empty.
        key: ``zero_fraction`` (linear colours) or ``relative_error`` (logarithmic ones).
        kind: of the stage; picks the colour.

    Returns:
        A figure element, never wider than its cells need.
    """
    grid = layer_map(layers)
    label_w = 16 + 7.2 * max(len(r) for r in grid.rows)
    cell_w = min((PICTURE_W - label_w) / len(grid.columns), MAX_CELL_W)
    values = [float(c[key]) for c in grid.cells.values() if c.get(key) is not None]
    body = [
        text_at(label_w + i * cell_w + (cell_w - GAP) / 2, 12, column or "-", "tick", "middle")
        for i, column in enumerate(grid.columns)
        if cell_w >= 18 or i % 5 == 0
    ]
    for j, row in enumerate(grid.rows):
        top = 20 + j * CELL_H
        body.append(text_at(label_w - 10, top + CELL_H / 2 + 3, row, "label", "end"))
        for i, column in enumerate(grid.columns):
            cell = grid.cells.get((row, column))
            if cell is None or cell.get(key) is None:
                continue
            body.append(_cell(label_w + i * cell_w, top, cell_w, cell, key, kind, values))
    width, height = label_w + cell_w * len(grid.columns), 24 + CELL_H * len(grid.rows)
    return (
        f'<figure style="width:{width:.0f}px"><figcaption>{_plain(caption)}'
        f"</figcaption>{picture(width, height, caption, body)}</figure>"
    )


def _cell(
    x: float, y: float, width: float, layer: Mapping[str, Json], key: str, kind: str, values: Sequence[float]
) -> str:
    value = float(layer[key])
    strength = _strength(value, values, key)
    written = f"{value:.0%}" if key == "zero_fraction" else _error(value)
    note = f"; {layer['note']}" if layer.get("note") else ""
    parts = [
        f"<g><title>{_plain(layer['name'])}: {written}{_plain(note)}</title>"
        f'<rect class="k-{kind}" x="{x:.1f}" y="{y:.1f}" width="{width - GAP:.1f}" height="{CELL_H - GAP}" '
        f'rx="3" fill-opacity="{FAINTEST + (1 - FAINTEST) * strength:.3f}"/>'
    ]
    if width >= TEXT_W:
        classes = "cell on" if strength >= STRONG else "cell"
        parts.append(text_at(x + (width - GAP) / 2, y + CELL_H / 2 + 2.5, written, classes, "middle"))
    return "".join(parts) + "</g>"


def _strength(value: float, values: Sequence[float], key: str) -> float:
    """Where ``value`` lies in the colour scale, in [0, 1]."""
    if key == "zero_fraction":
        return min(max(value, 0.0), 1.0)
    positive = [v for v in values if v > 0]
    if value <= 0 or not positive:
        return 0.0
    low, high = math.log(min(positive)), math.log(max(positive))
    return 0.15 + 0.75 * ((math.log(value) - low) / (high - low) if high > low else 0.5)


def _error(value: float) -> str:
    """A relative error in at most five characters."""
    if value == 0:
        return "0"
    return f"{value:.1%}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
