"""Where zeros may go. O = out_features, I = in_features, G = groups along I, M = members of a group."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from compresskit.errors import Fault, PatternError

MAX_SENTENCES = 10
FEW = 16
CHUNK = 1 << 22


class Pattern(Protocol):
    """A rule for where zeros may go; knows nothing of how scores were made. ``str()`` parses back."""

    @property
    def zero_fraction(self) -> float:
        """Of the weights, in (0, 1)."""
        ...

    def misfit(self, out_features: int, in_features: int) -> str:
        """What the shape would have to be, e.g. ``in_features divisible by 4``; empty if it fits."""
        ...

    @property
    def unit(self) -> int:
        """Inputs that have to be decided on together; 1 where any number may be."""
        ...

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Return the bool keep-mask (O, I) of the highest scores this pattern allows."""
        ...

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The same for inputs ``start`` to ``start + B`` alone; the parts of a weight make a mask of it.

        Args:
            score_OB: (O, B); ``start`` and B are multiples of :attr:`unit`.
            start: how many inputs have been decided on.
        """
        ...

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Name each group of the bool ``zero_OI`` that has too few zeros; at most ten sentences."""
        ...

    def eased(self, share: float) -> Pattern | None:
        """The pattern on the way to this one with ``share`` (in [0, 1]) of its zeros; None for no zeros."""
        ...


@dataclass(frozen=True, slots=True)
class NM:
    """Keep ``keep`` of every ``of`` consecutive inputs; NM(2, 4) is NVIDIA's 2:4."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            _refuse("pattern", str(self), "N:M with 0 < N < M, such as 2:4")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def zero_fraction(self) -> float:
        """Of the weights."""
        return 1 - self.keep / self.of

    def misfit(self, out_features: int, in_features: int) -> str:
        """``of`` has to divide in_features."""
        return f"in_features divisible by {self.of}" if in_features % self.of else ""

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Keep the ``keep`` highest scores of each group; PatternError if ``of`` does not divide I."""
        require_fit(self, score_OI)
        score_OGM = score_OI.reshape(score_OI.shape[0], -1, self.of)
        return ~smallest(score_OGM, self.of - self.keep).flatten(1)

    @property
    def unit(self) -> int:
        """A group."""
        return self.of

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """Groups know nothing of each other."""
        return self.keep_largest(score_OB)

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Check each group."""
        require_fit(self, zero_OI)
        count_OG = zero_OI.reshape(zero_OI.shape[0], -1, self.of).sum(-1)
        short = (count_OG < self.of - self.keep).nonzero()
        return at_most(
            (
                f"row {o}, group {g}: {_zeros(count_OG[o, g])} of {self.of - self.keep}"
                for o, g in short.tolist()
            ),
            len(short),
        )

    def eased(self, share: float) -> NM | None:
        """A group loses whole weights: 2:4 comes after 3:4; rounded down."""
        zeros = int(share * (self.of - self.keep) + 1e-9)
        return NM(self.of - zeros, self.of) if zeros else None


@dataclass(frozen=True, slots=True)
class RowUnstructured:
    """Zero the same fraction of every output row, in (0, 1)."""

    zero_fraction: float

    def __post_init__(self) -> None:
        _require_fraction(self.zero_fraction)

    def __str__(self) -> str:
        return percent(self.zero_fraction)

    def misfit(self, out_features: int, in_features: int) -> str:
        """Rounding has to leave at least one zero and one weight in each row."""
        return _rounding_misfit(self.zero_fraction, in_features, "row")

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Keep the highest scores of each row; the zero count is rounded to the nearest."""
        require_fit(self, score_OI)
        return ~smallest(score_OI, round(self.zero_fraction * score_OI.shape[1]))

    @property
    def unit(self) -> int:
        """Any inputs will do."""
        return 1

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """Each row has its share of zeros by then, to the nearest."""
        stop = start + score_OB.shape[1]
        return ~smallest(score_OB, round(self.zero_fraction * stop) - round(self.zero_fraction * start))

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Check each row."""
        wanted = round(self.zero_fraction * zero_OI.shape[1])
        count_O = zero_OI.sum(1)
        short = (count_O < wanted).nonzero().flatten()
        return at_most((f"row {o}: {_zeros(count_O[o])} of {wanted}" for o in short.tolist()), len(short))

    def eased(self, share: float) -> RowUnstructured | None:
        """Every row loses alike."""
        return RowUnstructured(share * self.zero_fraction) if share > 0 else None


@dataclass(frozen=True, slots=True)
class LayerUnstructured:
    """Zero a fraction of the whole layer, in (0, 1), wherever the lowest scores are."""

    zero_fraction: float

    def __post_init__(self) -> None:
        _require_fraction(self.zero_fraction)

    def __str__(self) -> str:
        return f"{percent(self.zero_fraction)}:layer"

    def misfit(self, out_features: int, in_features: int) -> str:
        """Rounding has to leave at least one zero and one weight."""
        return _rounding_misfit(self.zero_fraction, out_features * in_features, "layer")

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Keep the highest scores of the layer; the zero count is rounded to the nearest."""
        require_fit(self, score_OI)
        zero = smallest(score_OI.flatten(), round(self.zero_fraction * score_OI.numel()))
        return ~zero.view(score_OI.shape)

    @property
    def unit(self) -> int:
        """Any inputs will do."""
        return 1

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The layer has its share of zeros by then, to the nearest."""
        before = start * len(score_OB)
        after = before + score_OB.numel()
        count = round(self.zero_fraction * after) - round(self.zero_fraction * before)
        return ~smallest(score_OB.flatten(), count).view(score_OB.shape)

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Check the layer's count."""
        wanted, count = round(self.zero_fraction * zero_OI.numel()), int(zero_OI.sum())
        return (f"layer: {_zeros(count)} of {wanted}",) if count < wanted else ()

    def eased(self, share: float) -> LayerUnstructured | None:
        """Fewer of the whole layer."""
        return LayerUnstructured(share * self.zero_fraction) if share > 0 else None


def parse_pattern(text: str, *, where: str = "pattern") -> Pattern:
    """Read ``2:4``, ``50%``, ``0.5``, ``50%:row`` or ``50%:layer``, in any case.

    Args:
        text: what the recipe says.
        where: the place to name in an error.

    Returns:
        The pattern; ``str()`` of it parses back to an equal one.

    Raises:
        PatternError: the text is none of these, or leaves nothing to zero or nothing to keep.
    """
    plain = str(text).strip().lower().replace(" ", "")
    if found := re.fullmatch(r"(\d+):(\d+)", plain):
        keep, of = map(int, found.groups())
        return NM(keep, of) if 0 < keep < of else _refuse(where, text, "N:M with 0 < N < M, such as 2:4")
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)%|(0?\.\d+))(?::(row|layer))?", plain)
    if not found:
        _refuse(where, text, "a pattern such as 50%, 0.5, 50%:layer or 2:4")
    percent, fraction, scope = found.groups()
    zero_fraction = float(percent) / 100 if percent else float(fraction)
    if not 0 < zero_fraction < 1:
        _refuse(where, text, "more than 0% and less than 100%")
    return LayerUnstructured(zero_fraction) if scope == "layer" else RowUnstructured(zero_fraction)


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


def smallest(score: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest along the last dimension; of equal ones the first, on any device."""
    mark = _smallest_of_few if score.shape[-1] <= FEW else _smallest_of_many
    if score.dim() == 1 or score.numel() <= CHUNK:
        return mark(score, count)
    rows = max(1, CHUNK * len(score) // score.numel())  # keeps what selecting needs besides small
    return torch.cat([mark(part, count) for part in torch.split(score, rows)])


def _smallest_of_few(score: Tensor, count: int) -> Tensor:
    """By rank: how many are smaller, or equal and before it; for groups ten times faster than selecting."""
    rank = torch.zeros(score.shape, dtype=torch.int8, device=score.device)
    for j in range(score.shape[-1]):
        one = score[..., j : j + 1]
        rank += one < score
        rank[..., j + 1 :] += one == score[..., j + 1 :]
    return rank < count


def _smallest_of_many(score: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = score < threshold, score == threshold
    still = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= still))


def _rounding_misfit(zero_fraction: float, size: int, scope: str) -> str:
    if 0 < round(zero_fraction * size) < size:
        return ""
    return f"{scope}s so wide that {zero_fraction:.3%} of one rounds to a zero and leaves a weight"


def _require_fraction(zero_fraction: float) -> None:
    if not 0 < zero_fraction < 1:
        _refuse("pattern", str(zero_fraction), "a zero fraction between 0 and 1, both excluded")


def _refuse(where: str, text: str, expected: str) -> NoReturn:
    cure = "Write the fraction of zeros (50%), or how many of how many weights to keep (2:4)."
    raise PatternError(Fault(where, expected, repr(text), cure))


def _zeros(count: Tensor | int) -> str:
    return f"{int(count)} zero" if int(count) == 1 else f"{int(count)} zeros"
