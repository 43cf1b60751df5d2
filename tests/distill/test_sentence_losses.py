"""Losses on sentences against loops in float64; pooling; what the objective adds up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compresskit.distill import SENTENCE_LOSSES
from compresskit.distill.sentence_base import pooled
from compresskit.distill.sentences import SentenceLosses
from compresskit.training.objective import Classified, Embedded, Signal
from compresskit.training.sentences import LOGITS, SentenceObjective, Sentences

S, T, E = 4, 5, 6
Rows = list[list[float]]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def embedding_cosine(mine: Rows, theirs: Rows, i: int) -> float:
    return 1 - cosine(mine[i], theirs[i])


def embedding_mse(mine: Rows, theirs: Rows, i: int) -> float:
    return sum((x - y) ** 2 for x, y in zip(mine[i], theirs[i], strict=True)) / len(theirs[i])


def pairwise(mine: Rows, theirs: Rows, i: int) -> float:
    others = [j for j in range(len(mine)) if j != i]
    return sum((cosine(mine[i], mine[j]) - cosine(theirs[i], theirs[j])) ** 2 for j in others) / len(others)


def class_logits(mine: Rows, theirs: Rows, i: int) -> float:
    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in row)
        return [math.exp(x) / total for x in row]

    p, q = softmax(theirs[i]), softmax(mine[i])
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


ORACLES: dict[str, Callable[[Rows, Rows, int], float]] = {
    "embedding_cosine": embedding_cosine,
    "embedding_mse": embedding_mse,
    "pairwise": pairwise,
    "class_logits": class_logits,
}
OF_EMBEDDINGS = [name for name in SENTENCE_LOSSES if SENTENCE_LOSSES[name].reads != LOGITS]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def a_mask() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])


def sums_of(objective: SentenceLosses, mine: Tensor, theirs: Tensor, labels: Tensor | None = None) -> Any:
    says = Classified(theirs) if objective.reads == LOGITS else Embedded(theirs)
    return objective.sentence_sums(mine, Sentences(a_mask(), labels), Signal(says), lambda x: x)


@pytest.mark.parametrize("name", SENTENCE_LOSSES)
def test_equals_a_loop_over_sentences(name: str) -> None:
    mine, theirs = randn(S, E, seed=1), randn(S, E, seed=2)
    got = SENTENCE_LOSSES[name]()(mine, theirs)
    true = [ORACLES[name](mine.tolist(), theirs.tolist(), i) for i in range(S)]
    assert got.tolist() == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize("name", SENTENCE_LOSSES)
def test_gradients_are_the_formulas(name: str) -> None:
    theirs, mine = randn(S, E, seed=5), randn(S, E, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SENTENCE_LOSSES[name]()(x, theirs), (mine,))


@pytest.mark.parametrize("name", SENTENCE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contract_of_every_sentence_loss(name: str, dtype: torch.dtype) -> None:
    """A number for each sentence, zero for equal ones, nothing changed, the same twice, strides no matter."""
    loss = SENTENCE_LOSSES[name]()
    assert loss.weight == 1.0
    mine, theirs = randn(S, E, seed=7, dtype=dtype), randn(S, E, seed=8, dtype=dtype)
    before = [mine.clone(), theirs.clone()]
    got = loss(mine, theirs)
    assert got.shape == (S,)
    assert (got > 0).all()
    assert torch.equal(got, loss(mine, theirs))
    assert all(torch.equal(a, b) for a, b in zip(before, (mine, theirs), strict=True))
    torch.testing.assert_close(loss(mine.mT.contiguous().mT, theirs), got)
    assert loss(mine, mine).abs().max() < (1e-12 if dtype == torch.float64 else 2e-2)
    assert loss(torch.zeros_like(mine), theirs).isfinite().all()


def test_pairs_need_no_common_width_and_no_length() -> None:
    loss = SENTENCE_LOSSES["pairwise"]()
    mine, theirs = randn(S, 3, seed=1), randn(S, E, seed=2)
    torch.testing.assert_close(loss(7 * mine, 0.1 * theirs), loss(mine, theirs))
    assert loss(mine[:1], theirs[:1]).tolist() == [0.0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_looks_at_the_tokens_of_a_sentence_alone(pooling: str) -> None:
    states, mask = randn(S, T, E), a_mask()
    states[mask == 0] = math.nan
    true = []
    for row in range(S):
        tokens = [states[row, t].tolist() for t in range(T) if mask[row, t]]
        tokens = tokens[:1] if pooling == "cls" else tokens
        true.append([sum(column) / len(tokens) for column in zip(*tokens, strict=True)])
    torch.testing.assert_close(pooled(states, mask, pooling), torch.tensor(true, dtype=torch.float64))


def test_the_weighted_sum_and_its_parts() -> None:
    losses = [("embedding_cosine", {"weight": 0.5}), ("embedding_mse", {"weight": 2.0, "pooling": "cls"})]
    objective = SentenceLosses(losses=losses)
    assert isinstance(objective, SentenceObjective)
    mine, theirs = randn(S, T, E, seed=1), randn(S, T, E, seed=2)
    sums = sums_of(objective, mine.requires_grad_(), theirs)
    a, b = (pooled(x, a_mask(), "mean") for x in (mine, theirs))
    true = {"embedding_cosine": SENTENCE_LOSSES["embedding_cosine"]()(a, b).sum().item()}
    true["embedding_mse"] = SENTENCE_LOSSES["embedding_mse"]()(mine[:, 0], theirs[:, 0]).sum().item()
    assert {name: sums[name].item() for name in true} == pytest.approx(true)
    assert sums["loss"].item() == pytest.approx(0.5 * true["embedding_cosine"] + 2 * true["embedding_mse"])
    assert {name for name, part in sums.items() if part.requires_grad} == {"loss"}


def test_classes_are_softened_and_mixed_with_those_of_the_rows() -> None:
    objective = SentenceLosses(losses=[("class_logits", {})], temperature=2.0, cross_entropy_weight=0.25)
    assert objective.needs_labels
    mine, theirs = randn(S, 3, seed=1), randn(S, 3, seed=2)
    labels = torch.tensor([0, 2, -100, 1])
    sums = sums_of(objective, mine, theirs, labels)
    soft = sum(class_logits((mine / 2).tolist(), (theirs / 2).tolist(), i) for i in range(S))
    hard = -sum(mine[i].log_softmax(-1)[labels[i]].item() for i in (0, 1, 3))
    assert sums["class_logits"].item() == pytest.approx(4 * soft)
    assert sums["cross_entropy"].item() == pytest.approx(hard)
    assert sums["loss"].item() == pytest.approx(0.75 * 4 * soft + 0.25 * hard)
    same = sum(int(mine[i].argmax() == theirs[i].argmax()) for i in range(S))
    assert sums["agreement"].item() == same
    plain = sums_of(SentenceLosses(losses=[("class_logits", {})]), mine, theirs, labels)
    assert "cross_entropy" not in plain


def test_narrow_states_are_compared_in_float32() -> None:
    """The square of 300 is infinite in fp16."""
    big = torch.full((S, T, E), 300.0, dtype=torch.float16)
    sums = sums_of(SentenceLosses(losses=[("embedding_mse", {})]), big, -big)
    assert sums["loss"].item() == S * 600.0**2


def test_only_what_needs_one_width_is_projected() -> None:
    """Pairs are compared in the student's own width."""
    objective = SentenceLosses(losses=[("embedding_cosine", {}), ("pairwise", {})], widths=[3, E])
    made = objective.sentence_projection()
    assert made is not None
    assert tuple(made.weight.shape) == (E, 3)
    assert torch.equal(made.weight, objective.sentence_projection().weight)
    states, theirs = randn(S, T, 3, seed=1), randn(S, T, E, seed=2)
    weight = made.weight.double()
    says = Signal(Embedded(theirs))
    sums = objective.sentence_sums(states, Sentences(a_mask(), None), says, lambda x: x @ weight.mT)
    a, b = (pooled(x, a_mask(), "mean") for x in (states, theirs))
    assert sums["embedding_cosine"].item() == pytest.approx(
        SENTENCE_LOSSES["embedding_cosine"]()(a @ weight.mT, b).sum().item()
    )
    assert sums["pairwise"].item() == pytest.approx(SENTENCE_LOSSES["pairwise"]()(a, b).sum().item())
    assert SentenceLosses(losses=[("embedding_cosine", {})]).sentence_projection() is None


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_without_a_signal_there_is_nothing_to_learn(name: str) -> None:
    objective = SentenceLosses(losses=[(name, {})])
    with pytest.raises(ValueError, match="needs a teacher's signal"):
        objective.sentence_sums(randn(S, T, E), Sentences(a_mask(), None), None, lambda x: x)
