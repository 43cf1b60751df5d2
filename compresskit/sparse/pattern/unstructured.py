"""Zeros anywhere. O = out_features, I = in_features, B = some of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.sparse.pattern.base import at_most, percent, require_fit, require_fraction, zeros
from compresskit.sparse.pattern.select import smallest


@dataclass(frozen=True, slots=True)
class RowUnstructured:
    """Zero the same fraction of every output row, in (0, 1)."""

    zero_fraction: float

    def __post_init__(self) -> None:
        require_fraction(self.zero_fraction)

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
    def padded(self) -> RowUnstructured:
        """Nothing has to be divided."""
        return self

    @property
    def unit(self) -> int:
        """Any inputs will do."""
        return 1

    @property
    def units_compete(self) -> bool:
        """Zeros are counted over the row."""
        return True

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """Each row has its share of zeros by then, to the nearest."""
        stop = start + score_OB.shape[1]
        return ~smallest(score_OB, round(self.zero_fraction * stop) - round(self.zero_fraction * start))

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Check each row."""
        wanted = round(self.zero_fraction * zero_OI.shape[1])
        count_O = zero_OI.sum(1)
        short = (count_O < wanted).nonzero().flatten()
        return at_most((f"row {o}: {zeros(count_O[o])} of {wanted}" for o in short.tolist()), len(short))

    def eased(self, share: float) -> RowUnstructured | None:
        """Every row loses alike."""
        return RowUnstructured(share * self.zero_fraction) if share > 0 else None


@dataclass(frozen=True, slots=True)
class LayerUnstructured:
    """Zero a fraction of the whole layer, in (0, 1), wherever the lowest scores are."""

    zero_fraction: float

    def __post_init__(self) -> None:
        require_fraction(self.zero_fraction)

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
    def padded(self) -> LayerUnstructured:
        """Nothing has to be divided."""
        return self

    @property
    def unit(self) -> int:
        """Any inputs will do."""
        return 1

    @property
    def units_compete(self) -> bool:
        """Zeros are counted over the layer."""
        return True

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The layer has its share of zeros by then, to the nearest."""
        before = start * len(score_OB)
        after = before + score_OB.numel()
        count = round(self.zero_fraction * after) - round(self.zero_fraction * before)
        return ~smallest(score_OB.flatten(), count).view(score_OB.shape)

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Check the layer's count."""
        wanted, count = round(self.zero_fraction * zero_OI.numel()), int(zero_OI.sum())
        return (f"layer: {zeros(count)} of {wanted}",) if count < wanted else ()

    def eased(self, share: float) -> LayerUnstructured | None:
        """Fewer of the whole layer."""
        return LayerUnstructured(share * self.zero_fraction) if share > 0 else None


def _rounding_misfit(zero_fraction: float, size: int, scope: str) -> str:
    if 0 < round(zero_fraction * size) < size:
        return ""
    return f"{scope}s so wide that {zero_fraction:.3%} of one rounds to a zero and leaves a weight"
