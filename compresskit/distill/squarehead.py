"""SquareHead: how far a block's output is from the teacher's, as a share of how large the teacher's is.

The paper divides by the teacher's mean square over a batch. Here each token is divided by its own. So the
loss of a step is the same however it is divided into passes and ranks, and the few tokens whose states are
hundreds of times larger than all others do not set the scale for the rest.

Paper: Kurtic, Kuznedelev, Frantar, Goin, Alistarh, "Sparse Fine-tuning for Inference Acceleration of Large
Language Models", 2023, https://arxiv.org/abs/2310.06927.

Shapes: B = rows, T = tokens of a row, E = hidden width, the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.distill.mapping import FeatureFields

LEAST_SQUARE = 1e-12
"""A teacher's state of nothing but zeros has to be divided by something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SquareHead(FeatureFields):
    """Mean square of the difference, divided by the mean square of the teacher's state; no unit."""

    def __call__(self, student_BTE: Tensor, teacher_BTE: Tensor) -> Tensor:
        """The loss of each token; 1 for a student whose state is zero.

        Args:
            student_BTE: what a block of the student makes, in the teacher's width.
            teacher_BTE: what the teacher's block makes.

        Returns:
            (B, T), at least 0, a share.
        """
        square_BT = teacher_BTE.square().mean(-1).clamp_min(LEAST_SQUARE)
        return (student_BTE - teacher_BTE).square().mean(-1) / square_BT
