"""Skewed KL: the divergence from a mixture of both models, which bounds it and its gradient.

Paper: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
https://arxiv.org/abs/2402.03898.

Shapes: C = tokens, O = outcomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p
from typing import Annotated

import torch
from torch import Tensor

from compresskit.distill.base import LossFields
from compresskit.options import Within


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewedKL(LossFields):
    """KL(teacher || skew * teacher + (1 - skew) * student).

    Attributes:
        skew: share of the teacher in the mixture; 0 would be ``forward_kl``.
    """

    skew: Annotated[float, Within(0, 0.999, above=True)] = 0.1

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            Sum of p (log p - log m) with the mixture m, nats, (C,); and -p (1 - skew) q / m, (C, O).
        """
        from_student_CO = log_q_CO + log1p(-self.skew)
        log_m_CO = torch.logaddexp(log_p_CO + log(self.skew), from_student_CO)
        p_CO = log_p_CO.exp()
        value_C = ((log_p_CO - log_m_CO) * p_CO).sum(-1)
        return value_C, from_student_CO.sub_(log_m_CO).exp_().mul_(p_CO).neg_()


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewedReverseKL(LossFields):
    """KL(student || skew * student + (1 - skew) * teacher).

    Attributes:
        skew: share of the student in the mixture; 0 would be ``reverse_kl``.
    """

    skew: Annotated[float, Within(0, 0.999, above=True)] = 0.1

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            Sum of q (log q - log m) with the mixture m, nats, (C,); and q (log q - log m + 1 - skew q / m),
            (C, O).
        """
        from_student_CO = log_q_CO + log(self.skew)
        log_m_CO = torch.logaddexp(log_p_CO + log1p(-self.skew), from_student_CO)
        q_CO = log_q_CO.exp()
        part_CO = (log_q_CO - log_m_CO).mul_(q_CO)
        share_CO = from_student_CO.sub_(log_m_CO).exp_()
        return part_CO.sum(-1), part_CO.add_(q_CO).sub_(share_CO.mul_(q_CO))
