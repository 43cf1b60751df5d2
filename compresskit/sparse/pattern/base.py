"""What every pattern can do, and what patterns share.

Shapes: O = out_features, I = in_features, B = some of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NoReturn, Protocol

from torch import Tensor

from compresskit.errors import Fault, PatternError

MAX_SENTENCES = 10


class Pattern(Protocol):
    """A rule for where zeros may go; knows nothing of how scores were made. ``str()`` parses back.

    Scores say how far the output moves without a weight: a length, in any unit. What several weights move it
    adds up in squares, which is how a pattern compares weights that go together. A score below zero marks a
    weight that is zero already: it goes before all others, and adds nothing.
    """

    @property
    def zero_fraction(self) -> float:
        """Of the weights, in (0, 1); of a padded layer, of weights and padding."""
        ...

    def misfit(self, out_features: int, in_features: int) -> str:
        """What the shape would have to be, e.g. ``in_features divisible by 4``; empty if it fits."""
        ...

    @property
    def padded(self) -> Pattern:
        """The pattern for layers that it does not divide: they count as filled up with zeros.

        Itself where there is nothing to divide.
        """
        ...

    @property
    def unit(self) -> int:
        """Inputs that have to be decided on together; 1 where any number may be."""
        ...

    @property
    def units_compete(self) -> bool:
        """Whether a zero in one unit leaves one fewer to the others; else each has its own."""
        ...

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Return the bool keep-mask (O, I) of the highest scores this pattern allows."""
        ...

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The same for inputs ``start`` to ``start + B`` alone; the parts of a weight make a mask of it.

        Args:
            score_OB: (O, B); ``start`` is a multiple of :attr:`unit`, and so is B unless it ends the weight.
            start: how many inputs have been decided on.
        """
        ...

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Name each group of the bool ``zero_OI`` that has too few zeros; at most ten sentences."""
        ...

    def eased(self, share: float) -> Pattern | None:
        """The pattern on the way to this one with ``share`` (in [0, 1]) of its zeros; None for no zeros."""
        ...


def percent(fraction: float) -> str:
    """``0.5`` as ``50%``, to ten places."""
    return f"{fraction * 100:.10f}".rstrip("0").rstrip(".") + "%"


def require_fit(pattern: Pattern, tensor_OI: Tensor) -> None:
    """Raise PatternError unless ``pattern`` fits a weight of the shape of ``tensor_OI`` (O, I)."""
    expected = pattern.misfit(tensor_OI.shape[0], tensor_OI.shape[1])
    if expected:
        raise PatternError(
            Fault(
                where=f"pattern {pattern}",
                expected=expected,
                got=f"a weight of shape {tuple(tensor_OI.shape)}",
                cure="Choose another pattern, or add the layer to ignore.",
            )
        )


def at_most(sentences: Iterable[str], total: int) -> tuple[str, ...]:
    """The first ten of ``total`` sentences; where there are more, nine and how many the rest are."""
    if total <= MAX_SENTENCES:
        return tuple(sentences)
    return (*islice(sentences, MAX_SENTENCES - 1), f"and {total - MAX_SENTENCES + 1} more")


def zeros(count: Tensor | int) -> str:
    """``1 zero``, ``2 zeros``."""
    return f"{int(count)} zero" if int(count) == 1 else f"{int(count)} zeros"


def require_fraction(zero_fraction: float) -> None:
    """Raise PatternError unless there is something to zero and something to keep."""
    if not 0 < zero_fraction < 1:
        refuse("pattern", str(zero_fraction), "a zero fraction between 0 and 1, both excluded")


def refuse(where: str, text: str, expected: str) -> NoReturn:
    """Raise PatternError for a ``text`` that is no pattern."""
    cure = (
        "Write the fraction of zeros (50%), of zero blocks (50%:16x16), or how many of how many weights to "
        "keep (2:4)."
    )
    raise PatternError(Fault(where, expected, repr(text), cure))
