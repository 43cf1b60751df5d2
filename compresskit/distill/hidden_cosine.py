"""Hidden-state cosine: a block's output is to point where the teacher's points, whatever its length.

Paper: Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
lighter", 2019, https://arxiv.org/abs/1910.01108.

Shapes: B = rows, T = tokens of a row, E = hidden width, the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from compresskit.distill.mapping import FeatureFields


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenCosine(FeatureFields):
    """One less the cosine of the angle between the two states; no unit."""

    def __call__(self, student_BTE: Tensor, teacher_BTE: Tensor) -> Tensor:
        """The loss of each token; 1 where a state is zero.

        Args:
            student_BTE: what a block of the student makes, in the teacher's width.
            teacher_BTE: what the teacher's block makes.

        Returns:
            (B, T), from 0 to 2.
        """
        return 1 - cosine_similarity(student_BTE, teacher_BTE, dim=-1)
