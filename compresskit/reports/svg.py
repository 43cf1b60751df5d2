"""Inline SVG pictures: bars, a line of quality, a training curve. Colours are the page's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 520
LABEL_W = 92
ROW_H = 40
BAR_H = 18
BAR_W = 280  # of the longest bar; its figure stands to the right of it
PAD = 14
LINE_H = 210
MAX_POINTS = 600  # of a curve; more are thinned out evenly


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar picture.

    Attributes:
        label: at the left.
        kind: of the step; picks the colour.
        value: length of the bar, in the unit of the whole picture.
        text: the figure as written.
        ratio: to the first step, as written.
        base: the part of ``value`` from zero on that is drawn muted.
        whisker: first and third quartile.
    """

    label: str
    kind: str
    value: float
    text: str
    ratio: str = ""
    base: float = 0.0
    whisker: tuple[float, float] | None = None


def picture(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """An SVG element that scales with its column and is named for screen readers."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers from ``low`` to ``high``."""
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def text_at(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(text)}</text>'


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from zero, one for each step, with figure and ratio at their ends."""
    longest = max([b.value for b in rows] + [b.whisker[1] for b in rows if b.whisker]) or 1.0
    scale = BAR_W / longest
    height = ROW_H * len(rows) + 6
    body = [f'<line class="axis" x1="{LABEL_W}" y1="2" x2="{LABEL_W}" y2="{height - 4}"/>']
    for index, bar in enumerate(rows):
        middle = ROW_H * index + ROW_H / 2 + 2
        top = middle - BAR_H / 2
        body.append(text_at(LABEL_W - 12, middle + 4, bar.label, "label", "end"))
        start = LABEL_W + bar.base * scale
        if bar.base:
            body.append(_block(LABEL_W, top, bar.base * scale, "base", rounded=False))
        body.append(_block(start, top, (bar.value - bar.base) * scale, f"k-{bar.kind}", rounded=True))
        end = LABEL_W + max(bar.value, bar.whisker[1] if bar.whisker else 0) * scale
        if bar.whisker:
            body.append(_whisker(LABEL_W, bar.whisker, scale, middle))
        ratio = f'<tspan class="ratio" dx="7">{escape(bar.ratio)}</tspan>' if bar.ratio else ""
        body.append(
            f'<text x="{end + 10:.1f}" y="{middle + 4:.1f}" class="figure">{escape(bar.text)}{ratio}</text>'
        )
    return picture(WIDTH, height, title, body)


def _block(x: float, y: float, width: float, classes: str, *, rounded: bool) -> str:
    """A bar; only its far end is rounded, the near one stands on the axis."""
    width = max(width, 1.5)
    r = min(4.0, width / 2) if rounded else 0.0
    path = (
        f"M{x:.1f} {y:.1f}h{width - r:.1f}q{r:.1f} 0 {r:.1f} {r:.1f}v{BAR_H - 2 * r:.1f}"
        f"q0 {r:.1f} {-r:.1f} {r:.1f}h{r - width:.1f}z"
    )
    return f'<path class="{classes}" d="{path}"/>'


def _whisker(x: float, ends: tuple[float, float], scale: float, middle: float) -> str:
    low, high = x + ends[0] * scale, x + ends[1] * scale
    return (
        f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 5:.1f}v10'
        f'M{high:.1f} {middle - 5:.1f}v10"/>'
    )


def line(title: str, points: Sequence[tuple[str, str, float, str]]) -> str:
    """A line through one figure of each step; the vertical axis does not begin at zero and says so.

    Args:
        title: for screen readers.
        points: (label, kind, value, value as written) of each step.

    Returns:
        The SVG element.
    """
    values = [p[2] for p in points]
    low, high = min(values), max(values)
    # A difference of a thousandth must not look like a cliff: the window is at least 4% of the value.
    span = max(high - low, 0.04 * abs(high)) or 1.0
    floor, ceiling = (low + high) / 2 - 0.75 * span, (low + high) / 2 + 0.75 * span
    left, right, top, bottom = 58.0, WIDTH - 34.0, 22.0, LINE_H - 34.0

    def at(value: float) -> float:
        return bottom - (value - floor) / (ceiling - floor) * (bottom - top)

    step = (right - left) / max(len(points) - 1, 1)
    xs = [left + 24 + i * (step - 48 / max(len(points) - 1, 1)) for i in range(len(points))]
    body = []
    for value in ticks(floor, ceiling):
        body.append(
            f'<line class="grid" x1="{left}" y1="{at(value):.1f}" x2="{right}" y2="{at(value):.1f}"/>'
        )
        body.append(text_at(left - 10, at(value) + 4, f"{value:.4g}", "tick", "end"))
    track = " ".join(f"{x:.1f},{at(p[2]):.1f}" for x, p in zip(xs, points, strict=True))
    body.append(f'<polyline class="track" points="{track}"/>')
    for x, (label, kind, value, written) in zip(xs, points, strict=True):
        body.append(f'<circle class="k-{kind} dot" cx="{x:.1f}" cy="{at(value):.1f}" r="6.5"/>')
        body.append(text_at(x, at(value) - 14, written, "figure halo", "middle"))
        body.append(text_at(x, LINE_H - 10, label, "label", "middle"))
    return picture(WIDTH, LINE_H, title, body)


def curve(title: str, losses: Sequence[tuple[int, float]], kind: str) -> str:
    """A training loss by optimiser step: every value faint, their running mean strong."""
    left, right, top, bottom = 58.0, WIDTH - 16.0, 16.0, LINE_H - 34.0
    radius = max(len(losses) // 40, 1)
    windows = [losses[max(i - radius, 0) : i + radius + 1] for i in range(len(losses))]
    smooth = [(losses[i][0], sum(v for _, v in w) / len(w)) for i, w in enumerate(windows)]
    first, last = losses[0][0], max(losses[-1][0], losses[0][0] + 1)
    ceiling = max(loss for _, loss in losses) or 1.0

    def track(points: Sequence[tuple[int, float]]) -> str:
        thinned = points[:: math.ceil(len(points) / MAX_POINTS)]
        return " ".join(
            f"{left + (s - first) / (last - first) * (right - left):.1f},"
            f"{bottom - v / ceiling * (bottom - top):.1f}"
            for s, v in thinned
        )

    body = []
    for value in ticks(0.0, ceiling):
        y = bottom - value / ceiling * (bottom - top)
        body.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        body.append(text_at(left - 10, y + 4, f"{value:.3g}", "tick", "end"))
    body.append(f'<polyline class="s-{kind} faint" points="{track(losses)}"/>')
    body.append(f'<polyline class="s-{kind} strong" points="{track(smooth)}"/>')
    body.append(text_at(left, LINE_H - 10, f"step {first}", "tick"))
    body.append(text_at(right, LINE_H - 10, f"step {losses[-1][0]}", "tick", "end"))
    return picture(WIDTH, LINE_H, title, body)
