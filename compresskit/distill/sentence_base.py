"""The contracts of losses on whole sentences.

Shapes: S = sentences, T = tokens of the longest, D and E = widths, C = classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from torch import Tensor

from compresskit.options import Within
from compresskit.training.sentences import LOGITS, STATES

MEAN, CLS = "mean", "cls"
POOLINGS = (MEAN, CLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFields:
    """How much a loss on embeddings counts, and what an embedding is; inherited by each of them.

    Attributes:
        weight: what it is multiplied by before losses are added up.
        pooling: what of the last block's states is the embedding of a sentence: their ``mean`` over its
            tokens, or the state of its first one, ``cls``.
    """

    reads: ClassVar[str] = STATES
    one_width: ClassVar[bool] = True
    """Whether both embeddings have to be of one width, so that a student's of another is projected."""
    least_sentences: ClassVar[int] = 1
    """Of one forward pass, for there to be anything to learn."""

    weight: Annotated[float, Within(0, above=True)] = 1.0
    pooling: str = MEAN


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFields:
    """How much a loss on the logits of classes counts; inherited by each of them.

    Attributes:
        weight: what it is multiplied by before losses are added up.
    """

    reads: ClassVar[str] = LOGITS
    one_width: ClassVar[bool] = True
    least_sentences: ClassVar[int] = 1

    weight: Annotated[float, Within(0, above=True)] = 1.0


class SentenceLoss(Protocol):
    """A frozen dataclass with the fields above, and a pure function of what two models make of sentences."""

    reads: ClassVar[str]
    one_width: ClassVar[bool]
    least_sentences: ClassVar[int]

    @property
    def weight(self) -> float:
        """What the loss is multiplied by."""
        ...

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of each sentence.

        Args:
            student: embeddings (S, E) or logits (S, C), the latter divided by the temperature.
            teacher: the teacher's.

        Returns:
            (S,); 0 where the two are equal. Neither argument is changed.
        """
        ...


def pooled(states_STE: Tensor, mask_ST: Tensor, pooling: str) -> Tensor:
    """The embedding (S, E) of each sentence.

    Args:
        states_STE: of the last block.
        mask_ST: which tokens are no padding.
        pooling: one of :data:`POOLINGS`.
    """
    if pooling == CLS:
        return states_STE[:, 0]
    keep_ST1 = mask_ST[..., None].bool()
    count_S1 = mask_ST.sum(-1, keepdim=True).clamp_min(1)
    return states_STE.masked_fill(~keep_ST1, 0).sum(1) / count_S1
