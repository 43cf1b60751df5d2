"""The columns of a report: which figures, how they are written, and their ratio to the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compresskit.reports.chain import Chain, Step


def write_bytes(value: float) -> str:
    """Bytes in decimal units with three digits: ``1.04 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{_three(value)} {unit}"
        value /= 1000
    raise AssertionError("the last unit returns")


def write_ms(value: float) -> str:
    """Milliseconds with three digits; seconds from 10,000 ms on."""
    return f"{_three(value / 1000)} s" if value >= 10_000 else f"{_three(value)} ms"


def write_fraction(value: float) -> str:
    """A fraction as a percentage."""
    return f"{value:.1%}"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    if 0 < abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.{digits}f}"


def write_quality(value: float) -> str:
    """Perplexity or bits per byte with as many digits as two models may differ in."""
    digits = 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One column.

    Attributes:
        kind: of the record that holds it.
        name: in that record's values.
        title: of the column; ``{prompt_tokens}`` is filled in from the record's settings.
        write: number -> text.
        has_ratio: whether it is compared with the first step.
    """

    kind: str
    name: str
    title: str
    write: Callable[[float], str]
    has_ratio: bool = True

    def heading(self, chain: Chain) -> str:
        """The title with the settings it was measured under."""
        for step in chain.steps:
            if self.kind in step.records:
                return self.title.format_map({"prompt_tokens": "?", **step.records[self.kind].settings})
        return self.title.format_map({"prompt_tokens": "?"})

    def value(self, step: Step) -> float | None:
        """The figure of ``step``, or None."""
        return step.value(self.kind, self.name)

    def ratio(self, chain: Chain, step: Step) -> float | None:
        """The figure over the first step's; None for that step itself and where they do not compare."""
        first = next((s for s in chain.steps if self.value(s) is not None), None)
        value = self.value(step)
        if not self.has_ratio or first is None or first is step or value is None:
            return None
        if self.name == "perplexity" and first.value("quality", "tokens") != step.value("quality", "tokens"):
            return None  # another tokenizer or other text
        base = self.value(first)
        return value / base if base else None


FIGURES = (
    Figure("size", "total_bytes", "size on disk", write_bytes),
    Figure("size", "zero_fraction", "zeros", write_fraction, has_ratio=False),
    Figure("memory", "peak_bytes", "peak memory", write_bytes),
    Figure("memory", "model_bytes", "of it the model", write_bytes),
    Figure("memory", "cuda_peak_bytes", "GPU peak", write_bytes),
    Figure("latency", "prefill_ms", "prefill of {prompt_tokens}", write_ms),
    Figure("latency", "decode_ms", "per token", write_ms),
    Figure("quality", "perplexity", "perplexity", write_quality),
    Figure("quality", "bits_per_byte", "bits per byte", write_quality),
)


def figures_of(chain: Chain) -> tuple[Figure, ...]:
    """The columns for which some step has a figure."""
    return tuple(f for f in FIGURES if any(f.value(step) is not None for step in chain.steps))


def write_ratio(ratio: float | None) -> str:
    """``x0.27``; nothing where there is none."""
    return "" if ratio is None else f"x{ratio:.2f}" if ratio < 99.5 else f"x{ratio:.0f}"


def ends(chain: Chain, kind: str, name: str) -> tuple[float, float] | None:
    """A figure before the first stage and after the last; None where either was not measured."""
    if len(chain.steps) < 2:
        return None
    first, last = chain.steps[0].value(kind, name), chain.steps[-1].value(kind, name)
    return None if first is None or last is None else (first, last)
