"""What a recipe's zeros are worth, in sentences for whoever plans it or reads its report.

The figures are those of ``compresskit.kernels.limits``: bytes, and what they bound at batch 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from compresskit.kernels.limits import (
    DENSE,
    INT4_G128,
    INT8,
    READ_INTEGERS,
    WIDTHS,
    Packing,
    Values,
    ZeroLayout,
    gain_on,
    index_bits,
    limit,
    packing_on,
    packings,
    values_of,
)
from compresskit.stage import Outlook

S = TypeVar("S")

FEWER_BITS = ((INT8, "w8a8"), (INT4_G128, "w4a16-g128"))
TENSOR_CORES = "Sparse tensor cores multiply 2:4 faster in large batches, through torch.sparse."
CUT = "cut (fewer layers, heads, neurons) is faster on every runtime"
HOW = {
    "mask": "a bit says whether it is kept",
    "gap": "4 bits for a kept one count the zeros before it",
    "block": "a bit for each block says whether it is kept",
}


@dataclass(frozen=True, slots=True)
class Worth:
    """What zeros gain on given runtimes, and at most.

    Attributes:
        zeros: where they are.
        values: that most weights of these layers have when the chain ends.
        runtimes: that will load the result.
    """

    zeros: ZeroLayout
    values: Values
    runtimes: tuple[str, ...]

    @property
    def packing(self) -> Packing:
        """The one of fewest bytes."""
        return packings(self.values, self.zeros)[0]

    @property
    def limit(self) -> float:
        """What that gains over dense weights at batch 1, at most."""
        return limit(self.values, self.packing)

    @property
    def slow(self) -> tuple[str, ...]:
        """The runtimes on which zeros gain nothing."""
        return tuple(r for r in self.runtimes if gain_on(r, self.values, self.zeros) == 1)

    @property
    def fast(self) -> tuple[str, ...]:
        """The runtimes that read them packed."""
        return tuple(r for r in self.runtimes if r not in self.slow)

    def as_stored(self) -> str:
        """What a weight takes as it is stored, and how fast it runs."""
        each = bytes_each(self.values.bytes_per_weight)
        if not self.slow:
            return f"As numbers, zeros take {each} like any other weight."
        verb = "multiplies" if len(self.slow) == 1 else "multiply"
        return (
            f"Zeros are stored as numbers, {each}, and {joined(self.slow)} {verb} by them: neither smaller "
            "nor faster than dense, 1.00x."
        )

    def at_best(self) -> str:
        """What a kernel that reads packed zeros could make of it."""
        if self.packing.storage == DENSE:
            return "They are too few to pay for saying where they are: packed they would gain nothing either."
        if self.fast:
            return self._packed()
        kernel = "A kernel that reads them packed"
        if self.slow:
            kernel += ", which it has not," if len(self.slow) == 1 else ", which they have not,"
        text = (
            f"{kernel} would need {bytes_each(self.packing.bytes_per_weight)} "
            f"({_how(self.packing, self.zeros)}): at most {self.limit:.2f}x at batch 1."
        )
        return f"{text} {TENSOR_CORES}" if self.zeros.group == (2, 4) else text

    def _packed(self) -> str:
        """What the runtimes that read zeros packed make of them."""
        verb = "reads" if len(self.fast) == 1 else "read"
        packing = packing_on(self.fast[0], self.values, self.zeros)
        return (
            f"{joined(self.fast)} {verb} them packed, {bytes_each(packing.bytes_per_weight)} "
            f"({_how(packing, self.zeros)}): at most {limit(self.values, packing):.2f}x at batch 1, in "
            "the layers where that is measured to be faster than dense while the model is loaded."
        )

    def advice(self) -> str:
        """What is faster, and where."""
        fewer = next(((v, s) for v, s in FEWER_BITS if v.bits < self.values.bits), None)
        if fewer is None:
            return f"For speed: {CUT}."
        values, scheme = fewer
        alone = self.values.bytes_per_weight / values.bytes_per_weight
        both = self.values.bytes_per_weight / packings(values, self.zeros)[0].bytes_per_weight
        more = ", more than zeros can" if alone > self.limit else ""
        with_zeros = f" (with packed zeros {both:.2f}x)" if both > alone else ""
        return (
            f"For speed: {values} weights (quantize, {scheme}) give at most {alone:.2f}x{more}, where they "
            f"are read as they are, as by {joined(READ_INTEGERS)}{with_zeros}; {CUT}."
        )

    def sentences(self) -> tuple[str, str]:
        """What it is, and what to do."""
        return f"{self.as_stored()} {self.at_best()}", self.advice()


def with_worth(stages: Iterable[S], last: Outlook, runtimes: tuple[str, ...]) -> tuple[S, ...]:
    """Planned stages with what their zeros are worth among the notes of those that make any.

    Args:
        stages: of a plan: each has ``stage``, ``forecast`` and ``zeroed``, the layers whose zeros it makes.
        last: the model after the last of them, which tells how many bits a weight has in the end.
        runtimes: that will load it.
    """
    told = []
    for planned in stages:
        made: Any = planned
        if made.zeroed:
            zeros = layout_of(made.stage.pattern)
            worth = Worth(zeros, _values_in(last, made.zeroed), runtimes)
            notes = (*made.forecast.notes, *worth.sentences())
            made = replace(made, forecast=replace(made.forecast, notes=notes))
        told.append(made)
    return tuple(told)


def layout_of(text: str) -> ZeroLayout:
    """How the zeros of a recipe's pattern lie; PatternError if ``text`` is none."""
    # Patterns are of torch, which a report does without.
    from compresskit.sparse.pattern import NM, Block, parse_pattern

    pattern = parse_pattern(text)
    fraction = pattern.zero_fraction
    if isinstance(pattern, NM):
        return ZeroLayout(zero_fraction=fraction, group=(pattern.keep, pattern.of))
    if isinstance(pattern, Block):
        block = (pattern.rows, pattern.columns)
        return ZeroLayout(zero_fraction=fraction, block=block, block_fraction=fraction)
    return ZeroLayout(zero_fraction=fraction)


def usual_values(layers: Iterable[tuple[Values, int]]) -> Values:
    """What most weights have: of the commonest width the mean, scales included.

    Args:
        layers: the values of each layer, and how many weights it has.
    """
    parts: dict[float, list[tuple[Values, int]]] = {}
    for values, count in layers:
        parts.setdefault(values.bits, []).append((values, count))
    most = max(parts.values(), key=lambda alike: sum(count for _, count in alike))
    total = sum(count for _, count in most)
    return Values(most[0][0].bits, sum(values.scale_bits * count for values, count in most) / total)


def _values_in(last: Outlook, layers: Iterable[str]) -> Values:
    """What ``layers`` have in the end: quantised, or as the model is stored."""
    linears, bits = last.anatomy.linears, last.layer_bits
    # The mean of all parameters, norms of another dtype among them, is a little off.
    plain = Values(min(WIDTHS, key=lambda width: abs(width - 8 * last.weight_bytes)))
    return usual_values(
        (values_of(bits[n]) if n in bits else plain, linears[n].out_features * linears[n].in_features)
        for n in layers
    )


def _how(packing: Packing, zeros: ZeroLayout) -> str:
    """How it is said which weights are kept."""
    if packing.storage == "index" and zeros.group is not None:
        return f"{index_bits(zeros.group[1])} bits for a kept one say which of {zeros.group[1]} it is"
    return HOW[packing.storage]


def short(number: float) -> str:
    """At most three decimals, without zeros at the end."""
    return f"{number:.3f}".rstrip("0").rstrip(".")


def bytes_each(number: float) -> str:
    """``2 bytes a weight``."""
    return f"{short(number)} {'byte' if number == 1 else 'bytes'} a weight"


def joined(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
