"""Generalised Jensen-Shannon divergence: between forward and reverse KL, and bounded.

Paper: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
ICLR 2024, https://arxiv.org/abs/2306.13649.

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
class JSD(LossFields):
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.

    Attributes:
        beta: near 0 it is like ``forward_kl`` and near 1 like ``reverse_kl``, but scaled by beta or 1 - beta.
    """

    beta: Annotated[float, Within(0.001, 0.999)] = 0.5

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            The divergence, at most ln 2 nats, (C,); and (1 - beta) q (log q - log m), (C, O).
        """
        log_m_CO = torch.logaddexp(log_p_CO + log(self.beta), log_q_CO + log1p(-self.beta))
        of_teacher_C = ((log_p_CO - log_m_CO) * log_p_CO.exp()).sum(-1)
        part_CO = (log_q_CO - log_m_CO).mul_(log_q_CO.exp())
        value_C = self.beta * of_teacher_C + (1 - self.beta) * part_CO.sum(-1)
        return value_C, part_CO.mul_(1 - self.beta)
