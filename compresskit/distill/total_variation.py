"""Total variation distance: half the sum of what the probabilities differ by.

Paper: Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023,
https://arxiv.org/abs/2307.15190.

Shapes: C = tokens, O = outcomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.distill.base import LossFields


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalVariation(LossFields):
    """Half the L1 distance of the two distributions; from 0 to 1, no unit."""

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            Half the sum of abs(q - p), (C,); and q sign(q - p) / 2, (C, O).
        """
        q_CO = log_q_CO.exp()
        differs_CO = q_CO - log_p_CO.exp()
        return differs_CO.abs().sum(-1) / 2, differs_CO.sign_().mul_(q_CO).div_(2)
