"""Class logits: the student is to give each class the probability that the teacher gives it.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531.

Shapes: S = sentences, C = classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.distill.sentence_base import ClassFields


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLogits(ClassFields):
    """KL divergence of the student's distribution over classes from the teacher's, in nats."""

    def __call__(self, student_SC: Tensor, teacher_SC: Tensor) -> Tensor:
        """The loss of each sentence.

        Args:
            student_SC: logits, divided by the temperature.
            teacher_SC: the teacher's.

        Returns:
            (S,), nats, at least 0.
        """
        log_q_SC, log_p_SC = student_SC.log_softmax(-1), teacher_SC.log_softmax(-1)
        return (log_p_SC.exp() * (log_p_SC - log_q_SC)).sum(-1)
