"""Which numbers of units are legal, and which of them leave a wanted share of the parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, prod

from compresskit.errors import Fault, PatternError
from compresskit.modeling.anatomy import Anatomy
from compresskit.sparse.structured.dimensions import (
    FFN,
    HEADS,
    HIDDEN,
    UNITS,
    Dimension,
    Dimensions,
    pieces,
)

TOLERANCE = 0.05
"""How far from a wanted number of parameters a shape may be, as a fraction of it."""
CLOSE = 0.01
"""Shapes this close are as good as exact: of those the one with the most even shares is taken."""

Wanted = int | float


def legal_units(dimension: Dimension, multiple: int, *, follows: Dimension | None = None) -> list[int]:
    """Fewer units than there are, whose entries together are a multiple of ``multiple``.

    Args:
        dimension: a width.
        multiple: in entries of that width.
        follows: the hidden channels, where the heads ``dimension`` go along with them.
    """
    found = []
    for units in range(1, dimension.units):
        widths = [units * dimension.size]
        if follows:
            channels, rest = divmod(follows.units * units, dimension.units)
            if rest:
                continue
            widths.append(channels)
        if all(width % multiple == 0 for width in widths):
            found.append(units)
    return found


def choose_units(wanted: Wanted, dimension: Dimension, legal: Sequence[int], multiple: int) -> int:
    """The legal number of units that ``wanted`` asks for.

    Args:
        wanted: a fraction of all units, which is rounded to the nearest legal number; or a whole number, of
            neurons, query heads or hidden channels, which has to be legal.
        dimension: a width.
        legal: from :func:`legal_units`.
        multiple: what they were made with, for errors.

    Raises:
        PatternError: none is legal, rounding would take nothing away, or the number is not legal; the nearest
            ones are named.
    """
    kind, what = dimension.kind, "query heads" if dimension.kind == HEADS else UNITS[dimension.kind]
    total = dimension.units * dimension.parts
    if not legal:
        together = f" of {dimension.parts} that share keys and values" if dimension.parts > 1 else ""
        expected = f"fewer than {total} {what} in whole groups{together}"
        width = dimension.units * dimension.size
        got = f"none that makes a multiple of {multiple} of a width of {width}"
        raise PatternError(Fault(kind, expected, got, "Lower multiple, or leave this width as it is."))
    counts = [units * dimension.parts for units in legal]
    if isinstance(wanted, int):
        if wanted in counts:
            return legal[counts.index(wanted)]
        near = sorted(sorted(counts, key=lambda count: abs(count - wanted))[:2])
        expected = f"a legal number of {what}, fewer than {total}"
        verb = "one is" if len(near) == 1 else "ones are"
        cure = f"The nearest legal {verb} {' and '.join(map(str, near))}."
        raise PatternError(Fault(kind, expected, str(wanted), cure))
    exact = wanted * dimension.units
    nearest = min([*reversed(legal), dimension.units], key=lambda units: (abs(units - exact), -units))
    if nearest == dimension.units:
        expected = f"fewer than {total} {what} after rounding to a legal number"
        share = legal[-1] / dimension.units
        cure = f"Lower {kind}; the largest legal number is {counts[-1]}, which is {share:.4g}."
        raise PatternError(Fault(kind, expected, f"{total} for {wanted}", cure))
    return nearest


@dataclass(frozen=True, slots=True)
class Shape:
    """How many blocks and units of each width a model keeps; those not named are not cut."""

    blocks: int
    units: Mapping[str, int]


class Count:
    """How many parameters a model has for any shape.

    Args:
        anatomy: of the model; its blocks all have the same parameters.
        dimensions: its widths; None where none is cut.
    """

    def __init__(self, anatomy: Anatomy, dimensions: Dimensions | None) -> None:
        self.blocks = len(anatomy.blocks)
        self.whole = {kind: d.units for kind, d in (dimensions.widths if dimensions else {}).items()}
        # By whether inside a block, then by the widths that are factors: what to multiply these with.
        self._terms: dict[tuple[bool, tuple[str, ...]], float] = {}
        for name, axes in pieces(anatomy, dimensions):
            inside, kinds = anatomy.block_of(name) is not None, tuple(sorted(axis.kind for axis in axes))
            factor = prod(anatomy.parameter_shapes[name]) / prod(self.whole[kind] for kind in kinds)
            factor /= self.blocks if inside else 1
            self._terms[inside, kinds] = self._terms.get((inside, kinds), 0.0) + factor

    def __call__(self, shape: Shape) -> float:
        """The number for ``shape``."""
        units = {**self.whole, **shape.units}
        return sum(
            factor * (shape.blocks if inside else 1) * prod(units[kind] for kind in kinds)
            for (inside, kinds), factor in self._terms.items()
        )


@dataclass(frozen=True, slots=True)
class Choices:
    """What a search may choose from: for each number the values allowed, one where it is given.

    Attributes:
        blocks: numbers of blocks, ascending.
        units: of each width that is cut or may be, ascending.
        free: those whose shares should be even: ``layers`` and kinds of widths.
    """

    blocks: Sequence[int]
    units: Mapping[str, Sequence[int]]
    free: frozenset[str]


def find_shape(
    count: Count,
    choices: Choices,
    target: float,
    accepts: Callable[[Shape], bool],
    *,
    heads_follow: bool,
) -> Shape | None:
    """The shape whose number of parameters is nearest to ``target``; of close ones that of most even shares.

    Args:
        count: of the model.
        choices: what may be.
        target: parameters.
        accepts: whether the architecture allows a shape.
        heads_follow: heads keep the share that hidden channels do.

    Returns:
        None where the architecture allows no choice.
    """

    def cost(shape: Shape) -> float:
        error = abs(count(shape) / target - 1)
        shares = {"layers": shape.blocks / count.blocks}
        shares |= {kind: units / count.whole[kind] for kind, units in shape.units.items()}
        logs = [log(share) for name, share in shares.items() if name in choices.free]
        return 100 * max(error, CLOSE) + (max(logs) - min(logs) if logs else 0)

    shapes = sorted(_candidates(count, choices, target, heads_follow=heads_follow), key=cost)
    return next(filter(accepts, shapes), None)


def _candidates(count: Count, choices: Choices, target: float, *, heads_follow: bool) -> Iterator[Shape]:
    """Shapes worth a look: every number of blocks and channels, heads of like share, neurons to fit."""
    for blocks in choices.blocks:
        for hidden in choices.units.get(HIDDEN, [None]):
            units = {} if hidden is None else {HIDDEN: hidden}
            for heads in _heads(count, choices, hidden, heads_follow=heads_follow):
                units |= {} if heads is None else {HEADS: heads}
                if FFN not in choices.units:
                    yield Shape(blocks, dict(units))
                    continue
                none = count(Shape(blocks, {**units, FFN: 0}))
                each = count(Shape(blocks, {**units, FFN: 1})) - none
                for ffn in _nearest(choices.units[FFN], (target - none) / each, 2):
                    yield Shape(blocks, {**units, FFN: ffn})


def _heads(
    count: Count, choices: Choices, hidden: int | None, *, heads_follow: bool
) -> Sequence[int] | Sequence[None]:
    """Numbers of groups that go with so many hidden channels."""
    if HEADS not in choices.units:
        return [None]
    if hidden is None or HIDDEN not in choices.free:
        return choices.units[HEADS]
    share = count.whole[HEADS] * hidden / count.whole[HIDDEN]
    if heads_follow:
        return [units for units in choices.units[HEADS] if units == share]
    return _nearest(choices.units[HEADS], share, 3)


def _nearest(values: Sequence[int], wanted: float, number: int) -> list[int]:
    """The ``number`` of ascending ``values`` that are nearest to ``wanted``."""
    at = bisect_left(values, wanted)
    around = values[max(0, at - number) : at + number]
    return sorted(around, key=lambda value: abs(value - wanted))[:number]
