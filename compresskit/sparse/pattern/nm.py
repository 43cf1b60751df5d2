"""N of every M. O = out_features, I = in_features, B = some of the inputs, G = groups along I."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from compresskit.sparse.pattern.base import at_most, refuse, require_fit, zeros
from compresskit.sparse.pattern.select import smallest


@dataclass(frozen=True, slots=True)
class NM:
    """Keep ``keep`` of every ``of`` consecutive inputs; NM(2, 4) is NVIDIA's 2:4.

    Attributes:
        keep: weights of each group that may stay.
        of: weights of a group.
        pad: whether ``of`` need not divide in_features. The last group of each row then counts as filled up
            with inputs that are zero, and these are the first of its zeros: of 12 inputs, 8:16 zeroes 4.
    """

    keep: int
    of: int
    pad: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            refuse("pattern", str(self), "N:M with 0 < N < M, such as 2:4")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}{':pad' * self.pad}"

    @property
    def zero_fraction(self) -> float:
        """Of the weights, padding included."""
        return 1 - self.keep / self.of

    def misfit(self, out_features: int, in_features: int) -> str:
        """``of`` has to divide in_features; padding has to leave a zero to make."""
        if self.pad:
            return f"more than {self.keep} in_features" if in_features <= self.keep else ""
        return f"in_features divisible by {self.of}" if in_features % self.of else ""

    @property
    def padded(self) -> NM:
        """With a last group that may be short."""
        return replace(self, pad=True)

    @property
    def unit(self) -> int:
        """A group."""
        return self.of

    @property
    def units_compete(self) -> bool:
        """Groups know nothing of each other."""
        return False

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Keep the ``keep`` highest scores of each group; PatternError if the groups do not fit."""
        require_fit(self, score_OI)
        return self.keep_part(score_OI, 0)

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """Padding is zeroed before all else."""
        inputs = score_OB.shape[1]
        if self.pad and inputs % self.of:
            score_OB = functional.pad(score_OB, (0, -inputs % self.of), value=-torch.inf)
        score_OGM = score_OB.reshape(len(score_OB), -1, self.of)
        return smallest(score_OGM, self.of - self.keep).logical_not_().flatten(1)[:, :inputs]

    def missing(self, zero_OI: Tensor) -> tuple[str, ...]:
        """Check each group."""
        require_fit(self, zero_OI)
        padding = -zero_OI.shape[1] % self.of
        zero_OGM = functional.pad(zero_OI, (0, padding), value=False).reshape(len(zero_OI), -1, self.of)
        count_OG = zero_OGM.sum(-1)
        wanted_G = torch.full_like(count_OG[0], self.of - self.keep)
        wanted_G[-1] = max(0, self.of - self.keep - padding)
        short = (count_OG < wanted_G).nonzero()
        return at_most(
            (f"row {o}, group {g}: {zeros(count_OG[o, g])} of {int(wanted_G[g])}" for o, g in short.tolist()),
            len(short),
        )

    def eased(self, share: float) -> NM | None:
        """A group loses whole weights: 2:4 comes after 3:4; rounded down."""
        fewer = int(share * (self.of - self.keep) + 1e-9)
        return replace(self, keep=self.of - fewer) if fewer else None
