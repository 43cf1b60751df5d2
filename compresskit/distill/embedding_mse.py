"""Embedding MSE: a sentence's embedding is pulled to the teacher's, length and all.

Paper: Reimers, Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
EMNLP 2020, https://arxiv.org/abs/2004.09813.

Shapes: S = sentences, E = width of an embedding, the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compresskit.distill.sentence_base import EmbeddingFields


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingMSE(EmbeddingFields):
    """Mean square of the difference over the width, in squared units of the teacher's embeddings."""

    def __call__(self, student_SE: Tensor, teacher_SE: Tensor) -> Tensor:
        """The loss of each sentence.

        Args:
            student_SE: embeddings, in the teacher's width.
            teacher_SE: the teacher's.

        Returns:
            (S,), at least 0, squared units of an embedding.
        """
        return (student_SE - teacher_SE).square().mean(-1)
