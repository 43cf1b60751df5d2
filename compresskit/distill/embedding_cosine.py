"""Embedding cosine: a sentence's embedding is to point where the teacher's points, whatever its length.

That is all that embeddings compared by their cosines have to keep.

Paper: Reimers, Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
EMNLP 2020, https://arxiv.org/abs/2004.09813, which learns a teacher's embeddings so, with a squared distance.

Shapes: S = sentences, E = width of an embedding, the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from compresskit.distill.sentence_base import EmbeddingFields


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCosine(EmbeddingFields):
    """One less the cosine of the angle between the two embeddings; no unit."""

    def __call__(self, student_SE: Tensor, teacher_SE: Tensor) -> Tensor:
        """The loss of each sentence.

        Args:
            student_SE: embeddings, in the teacher's width.
            teacher_SE: the teacher's.

        Returns:
            (S,), from 0 to 2.
        """
        return 1 - cosine_similarity(student_SE, teacher_SE, dim=-1)
