"""The contracts of distillation losses.

Shapes: C = tokens, O = outcomes of a token: all ids, or some and perhaps the rest (see
``compresskit.kernels.reference.linear_divergence``), B = rows, T = tokens of a row, E = teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from compresskit.options import Within


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFields:
    """How much a distillation loss counts, and of what; inherited by each of them.

    Attributes:
        weight: what it is multiplied by before losses are added up.
        top_k: compare only so many of the teacher's likeliest ids, and all others as one outcome; None
            compares every id.
    """

    linear_in_p: ClassVar[bool] = False
    """Whether the gradient is linear in the teacher's probabilities, so that samples of them will do."""
    compares_ranks: ClassVar[bool] = False
    """Whether ids do not matter, so that the two distributions may be over different vocabularies."""

    weight: Annotated[float, Within(0, above=True)] = 1.0
    top_k: Annotated[int | None, Within(1)] = None


class DistillLoss(Protocol):
    """A frozen dataclass with the fields of ``LossFields``, and a pure function of two distributions."""

    linear_in_p: ClassVar[bool]
    compares_ranks: ClassVar[bool]

    @property
    def weight(self) -> float:
        """What the loss is multiplied by."""
        ...

    @property
    def top_k(self) -> int | None:
        """How many of the teacher's likeliest ids are compared one by one; None for all."""
        ...

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token and its slope.

        Args:
            log_p_CO: the teacher's log-probabilities, both softened by the temperature.
            log_q_CO: the student's.

        Returns:
            (C,), nats, 0 where the two are equal; and (C, O), its derivative by each log q taken by itself.
            Neither argument is changed.
        """
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A loss that changes as training goes on."""

    def at(self, progress: float) -> DistillLoss:
        """The loss when this share of the steps is done, in [0, 1]; that of the end where it is evaluated."""
        ...


class FeatureLoss(Protocol):
    """A frozen dataclass with the fields of ``FeatureFields``, and a pure function of two blocks' outputs.

    One whose ``takes`` is ``attention`` is a function of two ``Attended`` in their place, and of which token
    (B, T, T) sees which; it needs no common width.
    """

    takes: ClassVar[str]

    @property
    def weight(self) -> float:
        """What the loss is multiplied by."""
        ...

    def __call__(self, student_BTE: Tensor, teacher_BTE: Tensor) -> Tensor:
        """The loss of each token (B, T); 0 where the two are equal, and in the teacher's width both."""
        ...
