"""What a stage learns from a teacher's distributions, against each formula on whole logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compresskit.distill import LOSSES
from compresskit.distill.divergences import Divergences
from compresskit.training.objective import CrossEntropy, Head, Hidden, Listing, Signal

B, T, D, E, V = 3, 7, 6, 8, 19


@pytest.fixture
def parts() -> tuple[Tensor, Head, Tensor, Signal]:
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    labels = torch.randint(0, V, (B, T), generator=gen)
    labels[0, :4] = -100
    labels[2, 3] = -100
    head = Head(randn(V, D).requires_grad_(), randn(V))
    return randn(B, T, D).requires_grad_(), head, labels, Signal(Hidden(randn(B, T, E), Head(randn(V, E))))


def slow(parts: tuple[Tensor, Head, Tensor, Signal], temperature: float, weight: float, ids: int) -> Tensor:
    hidden, head, labels, signal = parts
    assert isinstance(signal.says, Hidden)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for t in range(T - 1):
            if labels[b, t + 1] == -100:
                continue
            student = hidden[b, t] @ head.weight_VD.T + head.bias_V
            teacher = signal.says.states_BTE[b, t] @ signal.says.head.weight_VD.T
            q = log_softmax(student[:ids] / temperature, -1)
            p = log_softmax(teacher[:ids] / temperature, -1)
            kl = temperature**2 * kl_div(q, p, log_target=True, reduction="sum")
            total = total + (1 - weight) * kl + weight * cross_entropy(student, labels[b, t + 1])
    return total


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.0, 0.0), (1.5, 0.3), (1.0, 1.0)])
def test_equals_the_formula(
    parts: tuple[Tensor, Head, Tensor, Signal], temperature: float, weight: float
) -> None:
    loss = Divergences(temperature=temperature, cross_entropy_weight=weight)
    got, true = loss(*parts)["loss"], slow(parts, temperature, weight, V)
    torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)
    leaves = [parts[0], parts[1].weight_VD]
    for mine, expected in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(true, leaves), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_ids_the_teacher_does_not_have_take_no_part(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    hidden, head, labels, signal = parts
    assert isinstance(signal.says, Hidden)
    cut = Signal(Hidden(signal.says.states_BTE, signal.says.head.cut(V - 4)))
    got = Divergences()(hidden, head, labels, cut)["loss"]
    torch.testing.assert_close(got, slow(parts, 1.0, 0.0, V - 4), rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(got, [head.weight_VD])
    assert not grad[V - 4 :].any()
    assert grad[: V - 4].any()


def test_a_batch_without_supervised_tokens_is_zero(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    hidden, head, labels, signal = parts
    loss = Divergences()(hidden, head, torch.full_like(labels, -100), signal)["loss"]
    assert loss.item() == 0
    loss.backward()


def test_without_a_teacher_it_refuses(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    with pytest.raises(ValueError, match="teacher"):
        Divergences()(*parts[:3], None)


def slow_loss(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Of one token, from probabilities; each as its paper writes it, with the default fields."""
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if name == "adaptive_kl":
        order = p.argsort(descending=True)
        gap = (p - q)[order].abs().detach()
        head = int((p[order].cumsum(0) < 0.5).sum()) + 1
        share = gap[:head].sum() / gap.sum()
        return share * kl(p, q) + (1 - share) * kl(q, p)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skewed_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skewed_reverse_kl": lambda: kl(q, 0.1 * q + 0.9 * p),
        "jsd": lambda: (kl(p, m) + kl(q, m)) / 2,
        "total_variation": lambda: (p - q).abs().sum() / 2,
        "taid": lambda: kl(p, q),
        "uld": lambda: (p.sort().values - q.sort().values).abs().sum(),
    }[name]()


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_and_its_gradient_are_its_papers(name: str) -> None:
    gen = torch.Generator().manual_seed(1)
    teacher, student = (3 * torch.randn(9, V, generator=gen, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    slow = torch.stack([slow_loss(name, p[i], q[i]) for i in range(9)])
    value, slope = LOSSES[name]()(log_softmax(teacher, -1), log_softmax(student, -1).detach())
    torch.testing.assert_close(value, slow.detach(), rtol=1e-10, atol=1e-12)
    (true,) = torch.autograd.grad(slow.sum(), student)
    mine = slope - student.softmax(-1) * slope.sum(-1, keepdim=True)
    torch.testing.assert_close(mine.detach(), true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_of_every_loss(
    name: str, top: int | None, parts: tuple[Tensor, Head, Tensor, Signal]
) -> None:
    hidden, head, labels, signal = parts
    if name in ("adaptive_kl", "taid"):
        pytest.skip("part of it is taken as a constant: see the test of its paper's gradient")
    loss = Divergences(losses=((name, {"top_k": top}),), temperature=1.3, cross_entropy_weight=0.2)

    small = [hidden[:1].detach().requires_grad_(), head.weight_VD]

    def of_one_row(hidden: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(signal.says, Hidden)
        one = Signal(Hidden(signal.says.states_BTE[:1], signal.says.head))
        return loss(hidden, Head(weight, head.bias_V), labels[:1], one)["loss"]

    assert torch.autograd.gradcheck(of_one_row, small)


def test_taid_begins_near_the_student_and_ends_at_the_teacher(
    parts: tuple[Tensor, Head, Tensor, Signal],
) -> None:
    hidden, head, labels, signal = parts
    loss = Divergences(losses=(("taid", {"start": 0.0}),))
    at = [loss(hidden, head, labels, replace(signal, progress=s))["loss"].item() for s in (0.0, 0.5, 1.0)]
    assert abs(at[0]) < 1e-12
    assert at[0] < at[1] < at[2]
    assert at[2] == pytest.approx(Divergences()(*parts)["loss"].item(), rel=1e-12)


def test_a_weighted_sum_of_losses(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    each = [Divergences(losses=((name, {}),))(*parts)["loss"] for name in ("forward_kl", "jsd")]
    both = Divergences(losses=[["forward_kl", {"weight": 0.5}], ["jsd", {"weight": 2.0}]])(*parts)
    torch.testing.assert_close(both["loss"], 0.5 * each[0] + 2 * each[1], rtol=1e-10, atol=1e-12)
    assert set(both) == {"loss", "forward_kl", "jsd", "agreement"}
    twice = Divergences(losses=(("jsd", {"beta": 0.1}), ("jsd", {"beta": 0.9})))(*parts)
    assert set(twice) == {"loss", "jsd_1", "jsd_2", "agreement"}


def test_a_listing_is_as_the_whole_teacher_coarsened(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    hidden, head, labels, signal = parts
    assert isinstance(signal.says, Hidden)
    log_p = log_softmax(signal.says.states_BTE @ signal.says.head.weight_VD.T, -1)
    ids = log_p.topk(4, -1).indices
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    listed = Signal(Listing(ids, torch.cat([log_p.gather(-1, ids), rest], -1), V))
    for name in LOSSES:
        got = Divergences(losses=((name, {}),))(hidden, head, labels, listed)
        true = Divergences(losses=((name, {"top_k": 4}),))(hidden, head, labels, signal)
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_where_the_teacher_says_nothing_only_the_text_counts(
    parts: tuple[Tensor, Head, Tensor, Signal],
) -> None:
    hidden, head, labels, signal = parts
    told = torch.arange(B * T).reshape(B, T) % 2 == 0
    loss = Divergences(cross_entropy_weight=0.3)
    got = loss(hidden, head, labels, replace(signal, told_BT=told))
    kl = Divergences()(hidden, head, labels.masked_fill(~told, -100), signal)["loss"]
    text = CrossEntropy()(hidden, head, labels, None)["loss"]
    torch.testing.assert_close(got["loss"], 0.7 * kl + 0.3 * text, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_contract_of_every_loss(name: str, parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    """A finite scalar, the same twice, nothing changed, and zero for a student like its teacher."""
    hidden, head, labels, signal = parts
    assert isinstance(signal.says, Hidden)
    inputs = (hidden, head.weight_VD, labels, signal.says.states_BTE)
    before = [t.detach().clone() for t in inputs]
    loss = Divergences(losses=((name, {}),), cross_entropy_weight=0.0)
    first, second = (loss(hidden, head, labels, signal) for _ in range(2))
    assert first["loss"].shape == ()
    assert first["loss"].isfinite()
    assert torch.equal(first["loss"], second["loss"])
    assert not any(v.requires_grad for k, v in first.items() if k != "loss")
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "an input was changed"
    twin = Signal(Hidden(hidden.detach(), Head(head.weight_VD.detach(), head.bias_V)))
    assert abs(loss(hidden, head, labels, twin)["loss"].item()) < 1e-9
