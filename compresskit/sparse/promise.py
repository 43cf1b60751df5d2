"""What pruning promises: every zero stays zero, group by group. O = out_features, I = in_features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compresskit.sparse.pattern import MAX_SENTENCES, at_most, parse_pattern

if TYPE_CHECKING:
    from compresskit.stage import Weights


@dataclass(frozen=True, slots=True)
class Zeros:
    """Each group of ``layer`` has the zeros of ``pattern``, and no zero that was made has come back to life.

    Attributes:
        layer: qualified module name.
        pattern: as :func:`compresskit.sparse.pattern.parse_pattern` reads it.
    """

    kind: ClassVar[str] = "zeros"

    layer: str
    pattern: str

    def broken(self, made: Weights, now: Weights) -> tuple[str, ...]:
        """Compare the layer's zeros, group by group and weight by weight.

        Args:
            made: the checkpoint of the stage that pruned.
            now: the checkpoint to check.

        Returns:
            Sentences such as ``row 3, group 17: 1 zero of 2``; empty when the promise is kept.
        """
        if f"{self.layer}.weight" not in now:
            return (f"{self.layer} is gone",)
        made_OI, now_OI = made.weight_OI(self.layer), now.weight_OI(self.layer)
        if made_OI.shape != now_OI.shape:
            return (f"shape {tuple(now_OI.shape)}, was {tuple(made_OI.shape)}",)
        short = parse_pattern(self.pattern).missing(now_OI == 0)
        if len(short) == MAX_SENTENCES:
            return short
        alive = ((made_OI == 0) & (now_OI != 0)).nonzero()
        revived = at_most(
            (f"row {o}, input {i}: was zero, is {now_OI[o, i].item():.6g}" for o, i in alive.tolist()),
            len(alive),
        )
        return at_most((*short, *revived), len(short) + len(revived))
