"""Forward KL as a stage computes it, against the formula on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compresskit.distill import LOSSES
from compresskit.distill.forward_kl import ForwardKL
from compresskit.training.objective import Head, Signal

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
    return randn(B, T, D).requires_grad_(), head, labels, Signal(randn(B, T, E), Head(randn(V, E)))


def slow(parts: tuple[Tensor, Head, Tensor, Signal], temperature: float, weight: float, ids: int) -> Tensor:
    hidden, head, labels, signal = parts
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for t in range(T - 1):
            if labels[b, t + 1] == -100:
                continue
            student = hidden[b, t] @ head.weight_VD.T + head.bias_V
            teacher = signal.hidden_BTE[b, t] @ signal.head.weight_VD.T
            q = log_softmax(student[:ids] / temperature, -1)
            p = log_softmax(teacher[:ids] / temperature, -1)
            kl = temperature**2 * kl_div(q, p, log_target=True, reduction="sum")
            total = total + (1 - weight) * kl + weight * cross_entropy(student, labels[b, t + 1])
    return total


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.0, 0.0), (1.5, 0.3), (1.0, 1.0)])
def test_equals_the_formula(
    parts: tuple[Tensor, Head, Tensor, Signal], temperature: float, weight: float
) -> None:
    loss = ForwardKL(temperature=temperature, cross_entropy_weight=weight)
    got, true = loss(*parts)["loss"], slow(parts, temperature, weight, V)
    torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)
    leaves = [parts[0], parts[1].weight_VD]
    for mine, expected in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(true, leaves), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_ids_the_teacher_does_not_have_take_no_part(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    hidden, head, labels, signal = parts
    cut = Signal(signal.hidden_BTE, signal.head.cut(V - 4))
    got = ForwardKL()(hidden, head, labels, cut)["loss"]
    torch.testing.assert_close(got, slow(parts, 1.0, 0.0, V - 4), rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(got, [head.weight_VD])
    assert not grad[V - 4 :].any()
    assert grad[: V - 4].any()


def test_a_batch_without_supervised_tokens_is_zero(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    hidden, head, labels, signal = parts
    loss = ForwardKL()(hidden, head, torch.full_like(labels, -100), signal)["loss"]
    assert loss.item() == 0
    loss.backward()


def test_without_a_teacher_it_refuses(parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    with pytest.raises(ValueError, match="teacher"):
        ForwardKL()(*parts[:3], None)


@pytest.mark.parametrize("name", LOSSES)
def test_contract_of_every_loss(name: str, parts: tuple[Tensor, Head, Tensor, Signal]) -> None:
    """A finite scalar, the same twice, nothing changed, and zero for a student like its teacher."""
    hidden, head, labels, signal = parts
    before = [t.detach().clone() for t in (hidden, head.weight_VD, labels, signal.hidden_BTE)]
    loss = LOSSES[name]()
    first, second = (loss(hidden, head, labels, signal) for _ in range(2))
    assert first["loss"].shape == ()
    assert first["loss"].isfinite()
    assert torch.equal(first["loss"], second["loss"])
    assert not any(v.requires_grad for k, v in first.items() if k != "loss")
    now = (hidden, head.weight_VD, labels, signal.hidden_BTE)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True)), "an input was changed"
    twin = Signal(hidden.detach(), Head(head.weight_VD.detach(), head.bias_V))
    assert abs(loss(hidden, head, labels, twin)["loss"].item()) < 1e-9
