"""Merge by character spans: the student's tokens get the probability of what they spell.

Where both tokenizers have just ended a token, ids that spell the same in both vocabularies have the teacher's
probability of that token, and all others are one outcome. If the student's next token ends where one of the
teacher's does too, it has an outcome of its own: the product of the probabilities of the teacher's tokens
that spell it (the chain rule), which is taken from the first of them. Where it ends inside of a token of the
teacher's, its probability is not known and nothing is said.

Paper: Patino et al., "Unlocking On-Policy Distillation for Any Model Family" (GOLD), 2025,
https://huggingface.co/spaces/HuggingFaceH4/on-policy-distillation (merging tokens that span the same text).

Shapes: B = rows, T = the student's tokens of a row, M = matches, N = the teacher's tokens between matches,
S = ids that spell the same, K = listed ids, C = tokens of one chunk, V = the teacher's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from compresskit.distill.align.base import Matched
from compresskit.kernels.reference.linear_divergence import LEAST_LOG
from compresskit.kernels.reference.projection import Projection, accumulator, chunks
from compresskit.options import Within
from compresskit.training.objective import Hidden, Listing, Signal

NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Distributions over ids that spell the same, the student's next token, and the rest.

    Attributes:
        top: of the ids that spell the same, list so many of the teacher's likeliest.
    """

    top: Annotated[int, Within(1)] = 32

    def __call__(self, matched: Matched, teacher: Hidden, temperature: float) -> Signal:
        """See ``Alignment.__call__``.

        Args:
            matched: where both tokenizers end a token.
            teacher: its hidden states and its projection.
            temperature: of the listed probabilities, and of each factor of a product.

        Returns:
            A signal with a listing.
        """
        known_M = matched.next_M >= 0
        row_M, ours_M = matched.row_M[known_M], matched.ours_M[known_M]
        first_M, count_M = matched.theirs_M[known_M], (matched.next_M - matched.theirs_M)[known_M]
        owner_N = torch.repeat_interleave(torch.arange(len(row_M), device=row_M.device), count_M)
        step_N = torch.arange(len(owner_N), device=row_M.device) - (count_M.cumsum(0) - count_M)[owner_N]
        row_N, at_N = row_M[owner_N], first_M[owner_N] + step_N
        said_N = matched.theirs_BU[row_N, at_N + 1]
        label_M = matched.ids_BT[row_M, ours_M + 1]
        listed = _Listed.made(
            matched, teacher, temperature, self.top, row_N, at_N, said_N, step_N == 0, label_M
        )
        spelt_M = torch.zeros_like(listed.rest_M).index_add_(0, owner_N, listed.log_said_N).exp()
        ids_MK, p_MO = listed.with_next(label_M, spelt_M, said_N[step_N == 0], count_M == 1, matched)
        shape = (*matched.ids_BT.shape, ids_MK.shape[1])
        ids_BTK = torch.arange(shape[2], device=ids_MK.device).expand(shape).clone()
        log_p_BTO = p_MO.new_zeros(*shape[:2], shape[2] + 1)
        told_BT = torch.zeros_like(matched.ids_BT, dtype=torch.bool)
        ids_BTK[row_M, ours_M] = ids_MK
        log_p_BTO[row_M, ours_M] = p_MO.log().clamp_min_(LEAST_LOG)
        told_BT[row_M, ours_M + 1] = True
        return Signal(Listing(ids_BTK, log_p_BTO, matched.students, temperature), told_BT=told_BT)


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the teacher says by its own tokens alone.

    Attributes:
        ids_MK: the student's.
        p_MK: their probabilities.
        rest_M: of all other tokens.
        own_M: of the teacher's id that spells the student's next token; 0 where there is none.
        log_said_N: of the teacher's own next token.
    """

    ids_MK: Tensor
    p_MK: Tensor
    rest_M: Tensor
    own_M: Tensor
    log_said_N: Tensor

    @classmethod
    def made(
        cls,
        matched: Matched,
        teacher: Hidden,
        temperature: float,
        top: int,
        row_N: Tensor,
        at_N: Tensor,
        said_N: Tensor,
        is_first_N: Tensor,
        label_M: Tensor,
    ) -> _Listed:
        """A few tokens at a time, so that no (N, V) tensor is ever whole."""
        states, head = teacher.states_BTE, teacher.head
        projection = Projection(head.weight_VD.to(states.dtype), head.bias_V, head.softcap)
        ours_S, theirs_S = matched.twins_S2.unbind(-1)
        twin_W = _table(matched.students, ours_S, theirs_S)
        dtype, count, listed = accumulator(states.dtype), len(label_M), min(top, len(ours_S))
        ids_MK = ours_S.new_zeros(count, listed)
        p_MK = torch.zeros(count, listed, dtype=dtype, device=states.device)
        rest_M, own_M = p_MK.new_zeros(count), p_MK.new_zeros(count)
        log_said_N = p_MK.new_zeros(len(row_N))
        match_N = is_first_N.cumsum(0) - 1
        for part in chunks(len(row_N), head.weight_VD.shape[0], states.device.type, 0):
            logits_CV = projection.logits(states[row_N[part], at_N[part]])
            log_p_CV = (logits_CV / temperature).log_softmax(-1)
            log_said_N[part] = log_p_CV.gather(-1, said_N[part, None])[:, 0]
            log_p_CV, places = log_p_CV[is_first_N[part]], match_N[part][is_first_N[part]]
            log_p_CK, index_CK = log_p_CV[:, theirs_S].topk(listed, dim=-1)
            ids_MK[places], p_MK[places] = ours_S[index_CK], log_p_CK.exp()
            rest_M[places] = log_p_CV.scatter(-1, theirs_S[index_CK], -torch.inf).logsumexp(-1).exp()
            twin_C = twin_W[label_M[places]]
            own_C = log_p_CV.gather(-1, twin_C.clamp_min(0)[:, None])[:, 0].exp()
            own_M[places] = own_C.masked_fill(twin_C == NONE, 0)
        return cls(ids_MK, p_MK, rest_M, own_M, log_said_N)

    def with_next(
        self, label_M: Tensor, spelt_M: Tensor, said_M: Tensor, is_one_M: Tensor, matched: Matched
    ) -> tuple[Tensor, Tensor]:
        """Ids (M, K), the student's next token among them, and the probabilities (M, K + 1).

        Args:
            label_M: the student's next token.
            spelt_M: probability of the teacher's tokens that spell it.
            said_M: the first of these.
            is_one_M: whether it is the only one.
            matched: as for the listing.
        """
        ours_S, theirs_S = matched.twins_S2.unbind(-1)
        first_M = _table(matched.teachers, theirs_S, ours_S)[said_M]
        moved_M = spelt_M.masked_fill(is_one_M & (first_M == label_M), 0)
        is_first_MK, is_label_MK = self.ids_MK == first_M[:, None], self.ids_MK == label_M[:, None]
        rest_M = self.rest_M - moved_M.masked_fill(is_first_MK.any(-1), 0)
        p_MK = self.p_MK + moved_M[:, None] * (is_label_MK.to(self.p_MK) - is_first_MK.to(self.p_MK))
        absent_M = ~is_label_MK.any(-1)
        ids_MK = self.ids_MK.clone()
        rest_M = rest_M + (p_MK[:, -1] - self.own_M).masked_fill(~absent_M, 0)
        p_MK[:, -1] = torch.where(absent_M, self.own_M + moved_M, p_MK[:, -1])
        ids_MK[:, -1] = torch.where(absent_M, label_M, ids_MK[:, -1])
        return ids_MK, torch.cat([p_MK, rest_M[:, None]], -1).clamp_min_(0)


def _table(size: int, ids_S: Tensor, to_S: Tensor) -> Tensor:
    """id -> what stands for it; NONE for others."""
    return torch.full((size,), NONE, dtype=torch.int64, device=ids_S.device).scatter_(0, ids_S, to_S)
