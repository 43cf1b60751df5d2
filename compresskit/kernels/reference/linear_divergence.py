"""Divergences of a student's next-token distribution from a teacher's, fused with both output projections.

For each token a divergence is a function of two distributions over the same outcomes. It gives its value and
its slope, the derivative by log q with every outcome's log q taken by itself; the derivative by the student's
logits follows from that here, once for all of them. Tokens are taken a few at a time and their gradients
are computed on the spot: no (N, V) tensor is ever whole, and the backward pass needs no logits again. Logits
are multiplied chunk by chunk, and looked at block by block within it; a block's gradient takes their place.

Outcomes are all V ids, or some ids of each token and perhaps a last one, "any other id", for the rest. A
divergence over these is at most that over all ids, and its gradient reaches every logit all the same.

Paper of the fusion: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024,
https://arxiv.org/abs/2410.10989 (the idea; this is plain torch).

Shapes: N = tokens, D = student's hidden width, E = teacher's, V = vocabulary of the teacher, W >= V = that of
the student, C = tokens of one chunk, K = listed ids of a token, O = outcomes: V, K or K + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.reference.projection import Gradients, Projection, accumulator, blocks, chunks

LEAST_LOG = -80.0
"""Log-probabilities of outcomes that cannot happen: low enough to weigh nothing, and no infinity."""


class Divergence(Protocol):
    """A pure function of two distributions."""

    def __call__(self, log_p_CO: Tensor, log_q_CO: Tensor) -> tuple[Tensor, Tensor]:
        """Value of each token (C,), nats, and its derivative by each log q, (C, O); changes no input."""
        ...


class Outcomes(NamedTuple):
    """What a teacher says of C tokens.

    Attributes:
        log_p_CO: log-probabilities, at the temperature that was asked for.
        ids_CK: which ids the first K outcomes are; None for all of them, in order.
        foreign: whether all of them are those of another vocabulary, in no relation to the student's.
    """

    log_p_CO: Tensor
    ids_CK: Tensor | None = None
    foreign: bool = False

    @property
    def has_rest(self) -> bool:
        """Whether the last outcome is "any other id"."""
        return self.ids_CK is not None and self.log_p_CO.shape[1] > self.ids_CK.shape[1]

    def top(self, count: int) -> Outcomes:
        """The ``count`` likeliest ids and the rest, of outcomes that are all ids."""
        log_p_CK, ids_CK = self.log_p_CO.topk(min(count, self.log_p_CO.shape[1]), dim=-1)
        rest_C1 = self.log_p_CO.scatter(-1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
        return Outcomes(torch.cat([log_p_CK, rest_C1], -1).clamp_min_(LEAST_LOG), ids_CK)


class Target(Protocol):
    """Where the teacher's distributions come from."""

    @property
    def vocabulary(self) -> int:
        """Ids the teacher may give a probability to: the first of the student's."""
        ...

    def chunk(self, part: slice, temperature: float) -> Callable[[slice], Outcomes]:
        """Of these tokens: a function of some of them, counted from the first, in the accumulator's type."""
        ...


@dataclass(frozen=True, slots=True)
class Projected:
    """Distributions over all ids, from the teacher's hidden states and output projection.

    Attributes:
        hidden_NE: (N, E); matrix products run in its type.
        projection: of the teacher.
    """

    hidden_NE: Tensor
    projection: Projection

    @property
    def vocabulary(self) -> int:
        """See :class:`Target`."""
        return self.projection.head_VD.shape[0]

    def chunk(self, part: slice, temperature: float) -> Callable[[slice], Outcomes]:
        """See :class:`Target`."""
        logits_CV = self.projection.logits(self.hidden_NE[part])
        return lambda block: Outcomes(_softened(logits_CV[block], temperature).log_softmax(-1))


@dataclass(frozen=True, slots=True)
class Foreign:
    """Distributions over all ids of another vocabulary, for divergences that look at no ids.

    Attributes:
        projected: over the teacher's own ids.
        vocabulary: the student's, all of which are compared.
    """

    projected: Projected
    vocabulary: int

    def chunk(self, part: slice, temperature: float) -> Callable[[slice], Outcomes]:
        """See :class:`Target`."""
        said = self.projected.chunk(part, temperature)
        return lambda block: said(block)._replace(foreign=True)


@dataclass(frozen=True, slots=True)
class Listed:
    """Distributions of which only some ids are known.

    Attributes:
        ids_NK: int64 (N, K), in [0, V).
        log_p_NO: (N, K), or (N, K + 1) with the rest last; taken at ``temperature``.
        vocabulary: V.
        temperature: of the log-probabilities.
    """

    ids_NK: Tensor
    log_p_NO: Tensor
    vocabulary: int
    temperature: float = 1.0

    def chunk(self, part: slice, temperature: float) -> Callable[[slice], Outcomes]:
        """See :class:`Target`.

        Raises:
            ValueError: the probabilities are of another temperature.
        """
        if temperature != self.temperature:
            raise ValueError(f"log-probabilities at temperature {self.temperature}, asked for {temperature}")
        log_p_CO, ids_CK = self.log_p_NO[part], self.ids_NK[part]
        log_p_CO = log_p_CO.to(accumulator(log_p_CO.dtype)).clamp(min=LEAST_LOG)
        return lambda block: Outcomes(log_p_CO[block], ids_CK[block])


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


class Term(NamedTuple):
    """One divergence of a sum.

    Attributes:
        divergence: the function.
        weight: what it is multiplied by.
        top: compare only so many of the teacher's likeliest ids, and the rest as one; 0 compares all.
    """

    divergence: Divergence
    weight: float = 1.0
    top: int = 0


class Result(NamedTuple):
    """Sums over N tokens, and what autograd needs.

    Attributes:
        total: weighted sum of all terms and of the cross entropy, nats; the only one with gradients.
        terms: each divergence before its weight, (number of terms,).
        cross_entropy: before its weight; 0 where its weight is.
        agreed: tokens whose likeliest id is the same in both; of listed ids the likeliest listed counts, and
            of foreign ones none.
        hidden_ND, head_WD, bias_W: gradients of the total; empty where none were asked for.
    """

    total: Tensor
    terms: Tensor
    cross_entropy: Tensor
    agreed: Tensor
    hidden_ND: Tensor
    head_WD: Tensor
    bias_W: Tensor


def linear_divergence(
    hidden_ND: Tensor,
    head_WD: Tensor,
    bias_W: Tensor | None,
    softcap: float,
    target: Target,
    terms: Sequence[Term],
    temperature: float,
    labels_N: Tensor | None,
    cross_entropy_weight: float,
    chunk: int,
    with_gradients: bool,
) -> Result:
    """Weighted sum of divergences, and of the next-token loss, over all tokens, and its gradients.

    Args:
        hidden_ND: (N, D), any float dtype; matrix products run in it, sums in fp32 (or fp64).
        head_WD: (W, D).
        bias_W: (W,) or None.
        softcap: bound of the logits; 0 for none.
        target: the teacher's distributions over the first V ids.
        terms: the divergences; both distributions are over those V ids.
        temperature: divides the logits of both in the divergences; nothing is multiplied by its square.
        labels_N: int64 (N,), each in [0, W); None where there is no cross entropy.
        cross_entropy_weight: what the next-token loss, at temperature 1 and over all W ids, is multiplied by.
        chunk: tokens at a time; 0 chooses.
        with_gradients: else the gradients come back empty.
    """
    student = Projection(head_WD.to(hidden_ND.dtype), bias_W, softcap)
    gradients = Gradients.zeros(hidden_ND, head_WD, with_gradients)
    sums = hidden_ND.new_zeros(len(terms) + 2, dtype=accumulator(hidden_ND.dtype))
    for part in chunks(hidden_ND.shape[0], head_WD.shape[0], hidden_ND.device.type, chunk):
        logits_CW = student.logits(hidden_ND[part])
        said = target.chunk(part, temperature)
        for block in blocks(logits_CW):
            logits_BW = logits_CW[block]
            log_q_BV = _softened(logits_BW[:, : target.vocabulary], temperature).log_softmax(-1)
            values, slopes = _through_terms(log_q_BV, said(block), terms)
            sums[:-1] += values
            labels_B, log_q_BW = None, log_q_BV
            if cross_entropy_weight and labels_N is not None:
                whole = temperature == 1 and target.vocabulary == logits_BW.shape[1]
                labels_B, log_q_BW = labels_N[part][block], log_q_BV if whole else logits_BW.log_softmax(-1)
                sums[-1] -= log_q_BW.gather(-1, labels_B[:, None]).sum()
            if with_gradients:
                grad_BV = _to_logits(slopes, log_q_BV).div_(temperature)
                grad_BW = _widened(grad_BV, logits_BW.shape[1])
                if labels_B is not None:
                    _add_cross_entropy(grad_BW, log_q_BW, labels_B, cross_entropy_weight)
                logits_BW.copy_(student.through_softcap(grad_BW, logits_BW))
        if with_gradients:
            gradients.add(part, hidden_ND[part], student, logits_CW)
    weights = sums.new_tensor([*(term.weight for term in terms), 0.0, cross_entropy_weight])
    return Result(
        (sums * weights).sum(),
        sums[:-2],
        sums[-1],
        sums[-2],
        gradients.hidden_ND,
        gradients.head_VD,
        gradients.bias_V,
    )


def _widened(grad_BV: Tensor, width: int) -> Tensor:
    """With zeros for ids that the teacher does not have."""
    return grad_BV if grad_BV.shape[1] == width else pad(grad_BV, (0, width - grad_BV.shape[1]))


class _Slope(NamedTuple):
    """Of several divergences over the same outcomes.

    Attributes:
        known: the outcomes.
        log_q_CO: the student's log-probabilities of them.
        by_log_q_CO: the weighted sum of the derivatives.
    """

    known: Outcomes
    log_q_CO: Tensor
    by_log_q_CO: Tensor


def _through_terms(log_q_CV: Tensor, said: Outcomes, terms: Sequence[Term]) -> tuple[Tensor, list[_Slope]]:
    """Sums of the terms and, last, of the tokens agreed upon; and the slopes, one for each set of outcomes.

    Args:
        log_q_CV: the student's, over all ids.
        said: by the teacher.
        terms: the divergences.

    Returns:
        (number of terms + 1,), and what :func:`_to_logits` takes.
    """
    values, slopes = log_q_CV.new_zeros(len(terms) + 1), []
    if not said.foreign:
        values[-1] = (_likeliest(said) == log_q_CV.argmax(-1)).sum()
    for top in dict.fromkeys(term.top for term in terms):
        known = said.top(top) if top and said.ids_CK is None and not said.foreign else said
        log_q_CO = _seen(log_q_CV, known)
        slope_CO = None
        for index, term in enumerate(terms):
            if term.top == top:
                value_C, by_log_q_CO = term.divergence(known.log_p_CO, log_q_CO)
                values[index] = value_C.sum()
                weighted_CO = by_log_q_CO if term.weight == 1 else term.weight * by_log_q_CO
                slope_CO = weighted_CO if slope_CO is None else slope_CO + weighted_CO
        assert slope_CO is not None
        slopes.append(_Slope(known, log_q_CO, slope_CO))
    return values, slopes


def _likeliest(said: Outcomes) -> Tensor:
    """The teacher's first choice, (C,); of listed ids the likeliest."""
    if said.ids_CK is None:
        return said.log_p_CO.argmax(-1)
    best_C1 = said.log_p_CO[:, : said.ids_CK.shape[1]].argmax(-1, keepdim=True)
    return said.ids_CK.gather(-1, best_C1)[:, 0]


def _seen(log_q_CV: Tensor, known: Outcomes) -> Tensor:
    """The student's log-probabilities of these outcomes, (C, O)."""
    if known.ids_CK is None:
        return log_q_CV
    listed_CK = log_q_CV.gather(-1, known.ids_CK)
    if not known.has_rest:
        return listed_CK.clamp_min_(LEAST_LOG)
    rest_C1 = log_q_CV.scatter(-1, known.ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([listed_CK, rest_C1], -1).clamp_min_(LEAST_LOG)


def _to_logits(slopes: Sequence[_Slope], log_q_CV: Tensor) -> Tensor:
    """The gradient by the student's logits, a new tensor (C, V)."""
    q_CV = log_q_CV.exp()
    grad_CV = None
    for slope in slopes:
        part_CV = _slope_to_logits(slope, q_CV)
        grad_CV = part_CV if grad_CV is None else grad_CV.add_(part_CV)
    return torch.zeros_like(q_CV) if grad_CV is None else grad_CV


def _slope_to_logits(slope: _Slope, q_CV: Tensor) -> Tensor:
    """log q of outcome o changes with logit j by q(j given o) - q(j)."""
    known, log_q_CO, slope_CO = slope
    total_C1 = slope_CO.sum(-1, keepdim=True)
    if known.ids_CK is None:
        return torch.addcmul(slope_CO, q_CV, total_C1, value=-1)
    listed_CK = slope_CO[:, : known.ids_CK.shape[1]]
    if not known.has_rest:
        return (q_CV * -total_C1).scatter_add_(-1, known.ids_CK, listed_CK)
    rest_C1 = slope_CO[:, -1:] * torch.exp(-log_q_CO[:, -1:])
    at_ids_CK = listed_CK - q_CV.gather(-1, known.ids_CK) * total_C1
    return (q_CV * (rest_C1 - total_C1)).scatter_(-1, known.ids_CK, at_ids_CK)


def _add_cross_entropy(grad_CW: Tensor, log_q_CW: Tensor, labels_C: Tensor, weight: float) -> None:
    """Add the gradient of -log q of the labels by the logits, times ``weight``, to ``grad_CW``."""
    at_label = labels_C[:, None]
    grad_CW.add_(log_q_CW.exp(), alpha=weight)
    grad_CW.scatter_add_(-1, at_label, torch.full_like(at_label, -weight, dtype=grad_CW.dtype))
