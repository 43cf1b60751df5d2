"""Forward KL: the student covers everything its teacher finds likely.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531.

Shapes: C = tokens, O = outcomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresskit.distill.base import LossFields


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKL(LossFields):
    """KL(teacher || student)."""

    linear_in_p: ClassVar[bool] = True

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            Sum of p (log p - log q), nats, (C,); and -p, (C, O).
        """
        p_CO = log_p_CO.exp()
        return ((log_p_CO - log_q_CO) * p_CO).sum(-1), p_CO.neg_()
