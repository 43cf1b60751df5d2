"""Pairwise: sentences are to be as alike to the student as they are to the teacher.

Only relations between sentences are learnt, so the widths of the two models may differ and nothing is
projected. They are those of the sentences of one forward pass: the loss of a step depends on how it is
divided into passes, but not on how these are divided among processes.

Paper: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, https://arxiv.org/abs/1904.05068,
with distances and angles where here it is cosines.

Shapes: S = sentences, D = student's width, E = teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from compresskit.distill.sentence_base import EmbeddingFields


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairwise(EmbeddingFields):
    """Mean square of the differences between cosines of a sentence with all others of its pass; no unit."""

    one_width: ClassVar[bool] = False
    least_sentences: ClassVar[int] = 2

    def __call__(self, student_SD: Tensor, teacher_SE: Tensor) -> Tensor:
        """The loss of each sentence.

        Args:
            student_SD: embeddings.
            teacher_SE: the teacher's.

        Returns:
            (S,), from 0 to 4; 0 for a sentence that is alone.
        """
        alike_SS, wanted_SS = (
            unit @ unit.mT for unit in (normalize(e, dim=-1) for e in (student_SD, teacher_SE))
        )
        square_SS = (alike_SS - wanted_SS).square()
        others = max(len(square_SS) - 1, 1)
        return (square_SS.sum(-1) - square_SS.diagonal()) / others
