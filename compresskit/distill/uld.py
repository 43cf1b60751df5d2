"""Universal logit distillation: both distributions sorted by probability, whatever their ids mean.

Paper: Boizard, El Haddad, Hudelot, Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit
Distillation Loss for LLMs", TMLR 2025, https://arxiv.org/abs/2402.12030.

Shapes: C = tokens, P = the teacher's outcomes of a token, O = the student's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from compresskit.distill.base import LossFields


@dataclass(frozen=True, slots=True, kw_only=True)
class ULD(LossFields):
    """L1 distance of the sorted probabilities, the shorter list filled up with zeros; 0 to 2, no unit."""

    compares_ranks: ClassVar[bool] = True

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``, but that the two may differ in width.

        Args:
            log_p_CO: the teacher's log-probabilities, (C, P).
            log_q_CO: the student's, (C, O).

        Returns:
            Sum of abs(q - p) rank by rank, (C,); and q sign(q - p), each put back to its id, (C, O).
        """
        sorted_q_CO, order_CO = log_q_CO.exp().sort(dim=-1, descending=True)
        sorted_p_CP = log_p_CO.exp().sort(dim=-1, descending=True).values
        ours, theirs = sorted_q_CO.shape[1], sorted_p_CP.shape[1]
        # Of a longer list of the teacher's, what is beyond the student's differs by all of it.
        beyond_C = sorted_p_CP[:, ours:].sum(-1)
        differs_CO = sorted_q_CO - pad(sorted_p_CP[:, :ours], (0, max(0, ours - theirs)))
        slope_CO = differs_CO.sign().mul_(sorted_q_CO)
        return differs_CO.abs().sum(-1) + beyond_C, slope_CO.scatter(-1, order_CO, slope_CO)
