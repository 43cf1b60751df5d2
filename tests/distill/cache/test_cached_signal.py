"""What a cached teacher says is what the live one says, as far as it was kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from taught import VOCABULARY, Some, cached

from compresskit.distill.cache.provider import Cached
from compresskit.distill.cache.sampled import Sampled
from compresskit.distill.divergences import Divergences
from compresskit.distill.forward_kl import ForwardKL
from compresskit.distill.teacher import Replica
from compresskit.errors import DataError
from compresskit.kernels.ops import linear_divergence
from compresskit.kernels.reference.linear_divergence import Listed, Target, Term
from compresskit.modeling import load_model
from compresskit.training.objective import Head, Hidden, Listing, Signal, predictions
from compresskit.training.order import stack

ORDERS = ([0, 1, 2, 3], [9, 4, 17, 3, 0], [23], [3])


def ready(teacher: Path, rows: Some, place: Path, **changes: object) -> Cached:
    made = cached(teacher, **changes)
    made.prepare([rows], place, "cpu")
    made.load()
    return made


def live(teacher: Path) -> Replica:
    return Replica(directory=str(teacher), vocabulary=VOCABULARY)


@pytest.mark.parametrize("some", ORDERS)
@pytest.mark.parametrize(("precision", "dtype"), [("model", torch.float32), ("bf16", torch.bfloat16)])
def test_hidden_states_are_the_teachers_own(
    teacher: Path, rows: Some, tmp_path: Path, some: list[int], precision: str, dtype: torch.dtype
) -> None:
    """Bit for bit, in any order and number of rows; rounded once where that was asked for."""
    batch = stack([rows[i] for i in some])
    said = ready(teacher, rows, tmp_path, keep="hidden", precision=precision).signal(batch).says
    true = live(teacher).signal(batch).says
    assert isinstance(said, Hidden)
    assert isinstance(true, Hidden)
    assert said.states_BTE.dtype == true.states_BTE.dtype
    mine, theirs = (predictions(s.states_BTE, batch["labels"])[0] for s in (said, true))
    assert torch.equal(mine, theirs.to(dtype).float())
    assert torch.equal(said.head.weight_VD, true.head.weight_VD)
    assert said.head.bias_V is None


@pytest.mark.parametrize("some", ORDERS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_that_of_the_teachers_logits(
    teacher: Path, rows: Some, tmp_path: Path, some: list[int], temperature: float
) -> None:
    batch = stack([rows[i] for i in some])
    said = ready(teacher, rows, tmp_path, k=5, temperature=temperature).signal(batch).says
    assert isinstance(said, Listing)
    assert (said.vocabulary, said.temperature) == (VOCABULARY, temperature)
    with torch.no_grad():
        logits = load_model(teacher)(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    log_p, labels = (logits.float() / temperature).log_softmax(-1), batch["labels"]
    for row, at in (labels[:, 1:] != -100).nonzero().tolist():
        best, ids = log_p[row, at].topk(5)
        rest = (1 - best.exp().sum()).log()
        assert torch.equal(said.ids_BTK[row, at], ids)
        found = said.log_p_BTO[row, at]
        assert found.exp().sum() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(found, torch.cat([best, rest[None]]), rtol=1e-3, atol=1e-3)
        stored = torch.cat([best, log_p[row, at].scatter(-1, ids, -torch.inf).logsumexp(-1)[None]]).half()
        torch.testing.assert_close(found, stored.float().log_softmax(-1), rtol=0, atol=1e-6)


def gradients(signal: Signal, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*labels.shape, 16, generator=generator).requires_grad_()
    head = Head(torch.randn(VOCABULARY, 16, generator=generator))
    loss = Divergences()(hidden, head, labels, signal)["loss"]
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def test_as_many_ids_as_there_are_is_the_whole_teacher(teacher: Path, rows: Some, tmp_path: Path) -> None:
    """And fewer are not: the comparison can tell."""
    batch = stack([rows[i] for i in range(8)])
    true, true_grad = gradients(live(teacher).signal(batch), batch["labels"])
    whole, grad = gradients(ready(teacher, rows, tmp_path, k=VOCABULARY).signal(batch), batch["labels"])
    assert whole == pytest.approx(float(true), rel=1e-4)
    torch.testing.assert_close(grad, true_grad, rtol=1e-3, atol=1e-3)
    few, _ = gradients(ready(teacher, rows, tmp_path, k=4).signal(batch), batch["labels"])
    assert few < 0.9 * true


def test_draws_give_the_right_gradient_on_average() -> None:
    """Of 20,000 independent draws of one distribution; the likeliest ids alone fail the same test."""
    copies, vocabulary = 20_000, 24
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 6, generator=generator)
    head = Head(torch.randn(vocabulary, 6, generator=generator))
    student, projection = (
        torch.randn(1, 8, generator=generator),
        torch.randn(vocabulary, 8, generator=generator),
    )
    p = (state @ head.weight_VD.T).softmax(-1)
    exact = ((student @ projection.T).softmax(-1) - p) @ projection

    def mean_error(target: Target) -> float:
        """Of the mean gradient, the largest number of standard errors off."""
        hidden = student.repeat(copies, 1).requires_grad_()
        sums = linear_divergence(hidden, projection, target, [Term(ForwardKL())])
        sums.total.backward()
        assert hidden.grad is not None
        spread = hidden.grad.std(0).clamp(min=1e-6) / copies**0.5
        return float(((hidden.grad.mean(0) - exact[0]) / spread).abs().max())

    kept = Sampled(draws=6, vocabulary=vocabulary, temperature=1.0)
    columns = kept.columns(state.repeat(copies, 1), head, [copies], [1])
    assert int(columns["counts"].long().sum()) == 6 * copies
    said = kept.says(columns, lambda lines: lines, None)
    assert mean_error(Listed(said.ids_BTK, said.log_p_BTO, vocabulary)) < 4
    best, ids = p.topk(6)
    likeliest = Listed(ids.repeat(copies, 1), (best / best.sum()).log().repeat(copies, 1), vocabulary)
    assert mean_error(likeliest) > 100


def test_draws_depend_on_the_row_alone(teacher: Path, rows: Some, tmp_path: Path) -> None:
    """Another order of rows, and one more of them, change no draw."""
    batch = stack([rows[i] for i in (7, 2, 20)])
    one = ready(teacher, rows, tmp_path, keep="sampled", k=9).signal(batch).says

    class Fewer(Some):
        def __len__(self) -> int:
            return 21

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return super().__getitem__(20 - index)

    other = ready(teacher, Fewer(), tmp_path, keep="sampled", k=9).signal(batch).says
    assert isinstance(one, Listing)
    assert isinstance(other, Listing)
    for mine, theirs in ((one.ids_BTK, other.ids_BTK), (one.log_p_BTO, other.log_p_BTO)):
        assert torch.equal(mine, theirs)
    counts = (one.log_p_BTO.exp() * 9)[0, :-1][batch["labels"][0, 1:] != -100]
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    assert (counts.sum(-1) - 9).abs().max() < 1e-3


def test_a_row_that_was_not_there_is_told(teacher: Path, rows: Some, tmp_path: Path) -> None:
    made = ready(teacher, rows, tmp_path)
    for changed in ("input_ids", "labels", "position_ids"):
        batch = stack([rows[0], rows[8]])
        batch[changed][1, -1] += 1
        with pytest.raises(DataError, match="a row that the teacher was not asked about"):
            made.signal(batch)
    with pytest.raises(ValueError, match="prepared before it is asked"):
        cached(teacher).signal(stack([rows[0]]))
