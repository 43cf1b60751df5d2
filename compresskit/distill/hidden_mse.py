"""Hidden-state MSE: a block's output is pulled to the teacher's, in the teacher's own scale.

That scale may be hundreds of times that of a loss in nats, so ``weight`` wants to be chosen; the largest
states count most. ``squarehead`` has no scale.

Paper: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, https://arxiv.org/abs/1412.6550; with a
linear map where widths differ as in Jiao et al., "TinyBERT: Distilling BERT for Natural Language
Understanding", 2019, https://arxiv.org/abs/1909.10351.

Shapes: B = rows, T = tokens of a row, E = hidden width, the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.distill.mapping import FeatureFields


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenMSE(FeatureFields):
    """Mean square of the difference over the width, in squared units of the teacher's states."""

    def __call__(self, student_BTE: Tensor, teacher_BTE: Tensor) -> Tensor:
        """The loss of each token.

        Args:
            student_BTE: what a block of the student makes, in the teacher's width.
            teacher_BTE: what the teacher's block makes.

        Returns:
            (B, T), at least 0, squared units of a state.
        """
        return (student_BTE - teacher_BTE).square().mean(-1)
