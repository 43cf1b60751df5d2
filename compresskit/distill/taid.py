"""TAID: the target moves from the student's own distribution to the teacher's as training goes on.

The target is the softmax of (1 - t) * student's logits + t * teacher's, with t rising from ``start`` to
``end`` in a straight line over the steps; the student's part in it takes no gradient. The paper's t also
rises faster where the loss falls; here it is a function of the step alone, so that a run that was broken off
goes on as if it had not been.

Paper: Shing, Misaki, Bao, Yokoi, Akiba, "TAID: Temporally Adaptive Interpolated Distillation for Efficient
Knowledge Transfer in Language Models", ICLR 2025, https://arxiv.org/abs/2501.16937.

Shapes: C = tokens, O = outcomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from compresskit.distill.base import LossFields
from compresskit.distill.forward_kl import ForwardKL
from compresskit.options import Within


@dataclass(frozen=True, slots=True, kw_only=True)
class TAID(LossFields):
    """KL(target || student).

    Attributes:
        start: share of the teacher in the target at the first step.
        end: and at the last; evaluations use it.
    """

    start: Annotated[float, Within(0, 1)] = 0.4
    end: Annotated[float, Within(0, 1, above=True)] = 1.0

    def at(self, progress: float) -> TAID:
        """See ``Scheduled.at``."""
        return replace(self, end=self.start + (self.end - self.start) * progress)

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DistillLoss.__call__``; at the end of training.

        Args:
            log_p_CO: the teacher's log-probabilities.
            log_q_CO: the student's.

        Returns:
            The divergence from the target, nats, (C,); and minus the target, (C, O).
        """
        target_CO = torch.lerp(log_q_CO, log_p_CO, self.end).log_softmax(-1)
        return ForwardKL()(target_CO, log_q_CO)
