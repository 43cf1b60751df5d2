"""Reverse KL: the student keeps to what its teacher finds likely, and may leave out some of it.

Paper: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024,
https://arxiv.org/abs/2306.08543 (the divergence; here token by token and over all ids, without sampling).

Shapes: C = tokens, O = outcomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.distill.base import LossFields


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKL(LossFields):
    """KL(student || teacher)."""

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            Sum of q (log q - log p), nats, (C,); and q (log q - log p + 1), (C, O).
        """
        q_CO = log_q_CO.exp()
        part_CO = (log_q_CO - log_p_CO).mul_(q_CO)
        return part_CO.sum(-1), part_CO.add_(q_CO)
