"""Merge by character spans: the student's tokens get the probability of what they spell.

Where both tokenizers have just ended a token, ids that spell the same in both vocabularies have the teacher's
probability of that token, and all others are one outcome. The student's next token has an outcome of its own
if it ends where one of the teacher's does too: the product of the probabilities of the teacher's tokens that
spell it (the chain rule), which is taken from the first of them. Elsewhere nothing is said.

A token of the teacher's with which it begins to spell longer tokens of the student's says little of the
student's token of the same spelling: a teacher of letters says "b" before any word in b, a student of words
hardly ever. So it belongs to the other outcomes, and so does the student's next token where the teacher's
spelling of it begins that of a longer one.

Where the student has read a space that the teacher writes before its next word, all of this is under the
condition that a space follows; and a token of the student's that ends with such a space counts that one may.

Paper: Patino et al., "Unlocking On-Policy Distillation for Any Model Family" (GOLD), 2025,
https://huggingface.co/spaces/HuggingFaceH4/on-policy-distillation (merging tokens that span the same text).

Shapes: B = rows, T = the student's tokens of a row, M = matches, N = the teacher's tokens at and between
matches, K = listed ids, C = tokens of one chunk, V = the teacher's vocabulary, W = the student's, 2 = without
a space and with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from compresskit.distill.align.base import Matched
from compresskit.kernels.chunking import chunk_tokens
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

    reads_twins: ClassVar[bool] = True

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
        count = min(self.top, len(matched.twins_S2))
        known_M = (matched.next_M > matched.theirs_M) & (matched.space_M >= 0) & (matched.next_space_M >= 0)
        if len(matched.spaced_R2) < count:  # every token lists as many ids
            known_M &= matched.space_M == 0
        spans = _Spans.of(matched, known_M)
        said = _said(matched, teacher, temperature, count, spans)
        ids_MK, p_MO = _with_next(said, matched, spans)
        shape = (*matched.ids_BT.shape, ids_MK.shape[1])
        ids_BTK = torch.arange(shape[2], device=ids_MK.device).expand(shape).clone()
        log_p_BTO = p_MO.new_zeros(*shape[:2], shape[2] + 1)
        told_BT = torch.zeros_like(matched.ids_BT, dtype=torch.bool)
        ids_BTK[spans.row_M, spans.ours_M] = ids_MK
        log_p_BTO[spans.row_M, spans.ours_M] = p_MO.log().clamp_min_(LEAST_LOG)
        told_BT[spans.row_M, spans.ours_M + 1] = True
        return Signal(Listing(ids_BTK, log_p_BTO, matched.students, temperature), told_BT=told_BT)


class _Spans(NamedTuple):
    """The student's tokens that are told, and the teacher's that spell them.

    Attributes:
        row_M, ours_M: the student's token before it.
        label_M: the token.
        space_M, next_space_M: whether the student has read a space that the teacher has not, before and
            after it; bool.
        owner_N: which of them each of the teacher's tokens belongs to.
        row_N, at_N: the teacher's token before it.
        said_N: the token; the last of a span is the one after it.
        is_first_N, is_after_N: whether it is the first of its span, or the one after it; bool.
    """

    row_M: Tensor
    ours_M: Tensor
    label_M: Tensor
    space_M: Tensor
    next_space_M: Tensor
    owner_N: Tensor
    row_N: Tensor
    at_N: Tensor
    said_N: Tensor
    is_first_N: Tensor
    is_after_N: Tensor

    @classmethod
    def of(cls, matched: Matched, known_M: Tensor) -> _Spans:
        """Those of ``matched`` that are ``known_M``."""
        row_M, ours_M = matched.row_M[known_M], matched.ours_M[known_M]
        first_M = matched.theirs_M[known_M]
        size_M = matched.next_M[known_M] - first_M + 1
        owner_N = torch.repeat_interleave(torch.arange(len(row_M), device=row_M.device), size_M)
        step_N = torch.arange(len(owner_N), device=row_M.device) - (size_M.cumsum(0) - size_M)[owner_N]
        row_N, at_N = row_M[owner_N], first_M[owner_N] + step_N
        last = matched.theirs_BU.shape[1] - 1
        return cls(
            row_M,
            ours_M,
            matched.ids_BT[row_M, ours_M + 1],
            matched.space_M[known_M] > 0,
            matched.next_space_M[known_M] > 0,
            owner_N,
            row_N,
            at_N,
            matched.theirs_BU[row_N, (at_N + 1).clamp_max(last)],
            step_N == 0,
            step_N == size_M[owner_N] - 1,
        )


class _Said(NamedTuple):
    """What the teacher says by its own tokens.

    Attributes:
        ids_MK: the student's.
        p_MK: their probabilities.
        rest_M: of all others.
        own_M: of the teacher's id that spells the student's next token; 0 where there is none.
        spelt_M: of the teacher's tokens that spell it.
    """

    ids_MK: Tensor
    p_MK: Tensor
    rest_M: Tensor
    own_M: Tensor
    spelt_M: Tensor


def _said(matched: Matched, teacher: Hidden, temperature: float, count: int, spans: _Spans) -> _Said:
    """A few tokens at a time, so that no (N, V) tensor is ever whole."""
    states, head = teacher.states_BTE, teacher.head
    projection = Projection(head.weight_VD.to(states.dtype), head.bias_V, head.softcap)
    twin_2W = _tables(matched.students, matched.twins_S2, matched.spaced_R2)
    opens_V = matched.opens_V[: head.weight_VD.shape[0]]
    matches = len(spans.row_M)
    p_MK = torch.zeros(matches, count, dtype=accumulator(states.dtype), device=states.device)
    ids_MK = torch.zeros(matches, count, dtype=torch.int64, device=states.device)
    rest_M, own_M = p_MK.new_zeros(matches), p_MK.new_zeros(matches)
    log_spelt_N = p_MK.new_zeros(len(spans.row_N))
    size = chunk_tokens(8 * max(len(opens_V), matched.students), states.device.type)  # a dozen such tensors
    for part in chunks(len(spans.row_N), len(opens_V), states.device.type, size):
        logits_CV = projection.logits(states[spans.row_N[part], spans.at_N[part]])
        log_p_CV = (logits_CV / temperature).log_softmax(-1)
        log_space_C = log_p_CV.masked_fill(~opens_V, -torch.inf).logsumexp(-1)
        owner_C, is_first_C, is_after_C = spans.owner_N[part], spans.is_first_N[part], spans.is_after_N[part]
        space_C = spans.space_M[owner_C] & is_first_C
        log_said_C = log_p_CV.gather(-1, spans.said_N[part, None])[:, 0]
        log_after_C = torch.where(spans.next_space_M[owner_C], log_space_C, torch.zeros_like(log_space_C))
        given_C = log_space_C.masked_fill(~space_C, 0)
        log_spelt_N[part] = torch.where(is_after_C, log_after_C, log_said_C - given_C)
        # Only what stands before the student's token is listed, given a space where it has read one.
        log_p_CV = (log_p_CV - given_C[:, None]).masked_fill(space_C[:, None] & ~opens_V, -torch.inf)[
            is_first_C
        ]
        places = owner_C[is_first_C]
        twin_CW = twin_2W[spans.space_M[places].long()]
        log_p_CW = log_p_CV.gather(-1, twin_CW.clamp_min(0)).masked_fill(twin_CW == NONE, -torch.inf)
        log_p_CK, ids_CK = log_p_CW.topk(count, dim=-1)
        ids_MK[places], p_MK[places] = ids_CK, log_p_CK.exp()
        rest_M[places] = log_p_CV.scatter(-1, twin_CW.gather(-1, ids_CK), -torch.inf).logsumexp(-1).exp()
        own_M[places] = log_p_CW.gather(-1, spans.label_M[places, None])[:, 0].exp()
    spelt_M = rest_M.new_zeros(matches).index_add_(0, spans.owner_N, log_spelt_N).exp()
    return _Said(ids_MK, p_MK, rest_M, own_M, spelt_M)


def _with_next(said: _Said, matched: Matched, spans: _Spans) -> tuple[Tensor, Tensor]:
    """Ids (M, K), the student's next token among them, and the probabilities (M, K + 1), the rest last."""
    label_M = spans.label_M
    ours_2V = _tables(matched.teachers, matched.twins_S2.flip(-1), matched.spaced_R2.flip(-1))
    first_M = ours_2V[spans.space_M.long(), spans.said_N[spans.is_first_N]]
    # Where the teacher's one token is the student's, its probability is there already.
    size_M = spans.owner_N.bincount(minlength=len(label_M)) - 1
    is_same_M = (size_M == 1) & (first_M == label_M) & ~spans.next_space_M
    is_open_M = matched.open_2W[spans.space_M.long(), label_M]
    moved_M = said.spelt_M.masked_fill(is_same_M | is_open_M, 0)
    is_first_MK, is_label_MK = said.ids_MK == first_M[:, None], said.ids_MK == label_M[:, None]
    rest_M = said.rest_M - moved_M.masked_fill(is_first_MK.any(-1), 0)
    p_MK = said.p_MK + moved_M[:, None] * (is_label_MK.to(said.p_MK) - is_first_MK.to(said.p_MK))
    absent_M = ~is_label_MK.any(-1) & ~is_open_M
    rest_M = rest_M + (p_MK[:, -1] - said.own_M).masked_fill(~absent_M, 0)
    ids_MK = said.ids_MK.clone()
    p_MK[:, -1] = torch.where(absent_M, said.own_M + moved_M, p_MK[:, -1])
    ids_MK[:, -1] = torch.where(absent_M, label_M, ids_MK[:, -1])
    return ids_MK, torch.cat([p_MK, rest_M[:, None]], -1).clamp_min_(0)


def _tables(size: int, *pairs: Tensor) -> Tensor:
    """(2, size): id -> what stands for it, by the first of ``pairs`` and by the second; NONE for others."""
    tables = [
        torch.full((size,), NONE, dtype=torch.int64, device=p.device).scatter_(0, p[:, 0], p[:, 1])
        for p in pairs
    ]
    return torch.stack(tables)
