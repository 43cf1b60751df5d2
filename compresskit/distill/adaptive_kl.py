"""Adaptive KL: forward KL where the likely ids differ, reverse KL where the unlikely ones do.

For each token the gap between the two distributions is summed apart over the head, the teacher's likeliest
ids that hold ``head`` of its probability, and over the tail. Forward KL has the head's share of the gap for
a weight and reverse KL the tail's; the weights take no gradient.

Paper: Wu, Tao, Wang, Yang, Zhao, Wong, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
Large Language Models", COLING 2025, https://arxiv.org/abs/2404.02657.

Shapes: C = tokens, O = outcomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from compresskit.distill.base import LossFields
from compresskit.distill.forward_kl import ForwardKL
from compresskit.distill.reverse_kl import ReverseKL
from compresskit.options import Within


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveKL(LossFields):
    """A mix of forward and reverse KL, anew for each token.

    Attributes:
        head: share of the teacher's probability that its likeliest ids, the head, hold.
    """

    head: Annotated[float, Within(0, 0.999, above=True)] = 0.5

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            The mix, nats, (C,), and its slope (C, O), both with the weights taken as constants.
        """
        share_C1 = self._head_share(log_p_CO.exp(), log_q_CO.exp())
        forward_C, forward_CO = ForwardKL()(log_p_CO, log_q_CO)
        reverse_C, reverse_CO = ReverseKL()(log_p_CO, log_q_CO)
        value_C = torch.lerp(reverse_C, forward_C, share_C1[:, 0])
        return value_C, torch.lerp(reverse_CO, forward_CO, share_C1)

    def _head_share(self, p_CO: Tensor, q_CO: Tensor) -> Tensor:
        """Of the gap, what lies among the likeliest ids: (C, 1); one half where there is no gap."""
        sorted_p_CO, order_CO = p_CO.sort(dim=-1, descending=True)
        gap_CO = (sorted_p_CO - q_CO.gather(-1, order_CO)).abs_()
        before_CO = sorted_p_CO.cumsum(-1) - sorted_p_CO
        all_C1 = gap_CO.sum(-1, keepdim=True)
        head_C1 = gap_CO.masked_fill_(before_CO >= self.head, 0).sum(-1, keepdim=True)
        return torch.where(all_C1 > 0, head_C1 / all_C1, torch.full_like(all_C1, 0.5))
