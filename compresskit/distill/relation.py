"""Relations: a token is to be as close to each other token as it is in the teacher, to its attention.

Queries are compared with queries, keys with keys and values with values, by scaled dot products, which no
width enters: all heads are put side by side and divided anew into as many relation heads in both models. So
neither widths nor numbers of heads need agree, and nothing is projected. One pair of blocks is enough: the
last of each, or in a large teacher one somewhat below.

Paper: Wang, Wei, Dong, Bao, Yang, Zhou, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
Compression of Pre-Trained Transformers", NeurIPS 2020, https://arxiv.org/abs/2002.10957; Wang, Bao, Huang,
Dong, Wei, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
Transformers", 2020, https://arxiv.org/abs/2012.15828.

Shapes: B = rows, T = tokens of a row, H = heads of a model, W = width of a head, R = relation heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.distill.mapping import FeatureFields, Layers
from compresskit.modeling.attention import Attended
from compresskit.options import Within

KINDS = {"qq": 0, "kk": 1, "vv": 2}
"""Of relations, and their place in ``Attended``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation(FeatureFields):
    """KL divergence of the student's relations from the teacher's in nats, a mean over relation heads.

    Attributes:
        layers: as of every feature loss; by default the last block of each.
        of: which relations, added up: ``qq``, ``kk`` and ``vv``.
        relation_heads: into so many the heads of each model are divided; None is the largest number that
            divides all numbers of heads.
    """

    takes: ClassVar[str] = "attention"

    layers: Layers = "last_1"
    of: tuple[str, ...] = ("qq", "kk", "vv")
    relation_heads: Annotated[int | None, Within(1)] = None

    def __call__(self, student: Attended, teacher: Attended, sees_BTT: Tensor) -> Tensor:
        """The loss of each token.

        Args:
            student: queries, keys and values (B, T, H, W) of one block.
            teacher: the teacher's.
            sees_BTT: bool, which token is compared with which.

        Returns:
            (B, T), nats, at least 0; without meaning for a token that sees none.
        """
        heads = self.relation_heads or math.gcd(*(t.shape[2] for side in (student, teacher) for t in side))
        total_BT = torch.zeros((), device=sees_BTT.device)
        for kind in self.of:
            place = KINDS[kind]
            log_q_BRTT = _relations(student[place], heads, sees_BTT)
            log_p_BRTT = _relations(teacher[place], heads, sees_BTT)
            kl_BRT = (log_p_BRTT.exp() * (log_p_BRTT - log_q_BRTT)).sum(-1)
            total_BT = total_BT + kl_BRT.mean(1)
        return total_BT


def _relations(vectors_BTHW: Tensor, heads: int, sees_BTT: Tensor) -> Tensor:
    """Log-probabilities (B, R, T, T) of each token's relations to those that it sees."""
    rows, tokens = vectors_BTHW.shape[:2]
    split_BRTW = vectors_BTHW.reshape(rows, tokens, heads, -1).transpose(1, 2)
    scores_BRTT = split_BRTW @ split_BRTW.mT / math.sqrt(split_BRTW.shape[-1])
    # Finite, since of what is not seen a difference is taken that has to be zero.
    least = torch.finfo(scores_BRTT.dtype).min / 2
    return scores_BRTT.masked_fill(~sees_BTT[:, None], least).log_softmax(-1)
