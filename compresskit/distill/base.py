"""The contracts of distillation losses. Shapes as in ``compresskit.training.objective``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from compresskit.training.objective import Head, Signal


class DistillLoss(Protocol):
    """A frozen dataclass whose fields are the hyperparameters and that is a pure function.

    A stage's ``temperature`` and ``cross_entropy_weight`` are passed to a loss that has such fields.
    """

    needs_teacher: ClassVar[bool]

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Sums over supervised tokens, in nats; ``loss`` is minimised. Never makes two (B, T, V) tensors."""
        ...


class FeatureLoss(Protocol):
    """A frozen dataclass with the fields of ``FeatureFields``, and a pure function of two blocks' outputs."""

    @property
    def weight(self) -> float:
        """What the loss is multiplied by."""
        ...

    def __call__(self, student_BTE: Tensor, teacher_BTE: Tensor) -> Tensor:
        """The loss of each token (B, T); 0 where the two are equal, and in the teacher's width both."""
        ...
