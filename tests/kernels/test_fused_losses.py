"""The fused losses against the slow, whole-logits formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compresskit.errors import EngineError
from compresskit.kernels import dispatch
from compresskit.kernels.ops import linear_cross_entropy, linear_divergence
from compresskit.kernels.reference.linear_divergence import Listed, Outcomes, Projected, Term
from compresskit.kernels.reference.projection import Projection

N, D, E, V = 13, 6, 5, 17


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return (log_p.exp() * (log_p - log_q)).sum(-1), -log_p.exp()


def linear_kl(
    hs: Tensor,
    ws: Tensor,
    ht: Tensor,
    wt: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    chunk: int = 0,
) -> Tensor:
    target = Projected(ht, Projection(wt.to(ht.dtype), None, 0.0))
    return linear_divergence(
        hs, ws, target, [Term(forward_kl)], bias_W=bias, softcap=softcap, temperature=temperature, chunk=chunk
    ).total


def softcapped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def slow_kl(
    hs: Tensor, ws: Tensor, bs: Tensor, ht: Tensor, wt: Tensor, temperature: float, cap: float
) -> Tensor:
    q = log_softmax(softcapped(hs @ ws.T + bs, cap) / temperature, -1)
    p = log_softmax((ht @ wt.T) / temperature, -1)
    return kl_div(q, p, log_target=True, reduction="sum")


@pytest.fixture
def made() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(N, D), (V, D), (V,), (N, E), (V, E)]
    return [torch.randn(*s, generator=gen, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("chunk", [0, 1, 4, 13, 50])
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, 0.0), (2.5, 0.0), (1.5, 3.0)])
def test_kl_equals_the_formula(made: list[Tensor], chunk: int, temperature: float, cap: float) -> None:
    hs, ws, bs, ht, wt = made
    student = [t.clone().requires_grad_() for t in (hs, ws, bs)]
    slow = slow_kl(student[0], student[1], student[2], ht, wt, temperature, cap)
    expected = torch.autograd.grad(slow, student)
    got = linear_kl(
        student[0],
        student[1],
        ht,
        wt,
        bias=student[2],
        temperature=temperature,
        softcap=cap,
        chunk=chunk,
    )
    torch.testing.assert_close(got, slow, rtol=1e-12, atol=1e-12)
    for mine, true in zip(torch.autograd.grad(3 * got, student), expected, strict=True):
        torch.testing.assert_close(mine, 3 * true, rtol=1e-10, atol=1e-12)


def test_kl_gradcheck(made: list[Tensor]) -> None:
    hs, ws, bs, ht, wt = (t[:5].clone() for t in made)
    inputs = (hs.requires_grad_(), ws.requires_grad_(), bs.requires_grad_())

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kl(h, w, ht, wt, bias=b, temperature=1.7, softcap=4.0, chunk=2)

    assert torch.autograd.gradcheck(loss, inputs)


def test_no_tokens_are_zero(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    none = linear_kl(hs[:0].requires_grad_(), ws, ht[:0], wt)
    assert none.item() == 0
    none.backward()


def test_kl_of_itself_is_zero(made: list[Tensor]) -> None:
    hs, ws, *_ = made
    assert abs(linear_kl(hs, ws, hs, ws).item()) < 1e-12


def test_a_teacher_of_more_ids_is_refused(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    with pytest.raises(ValueError, match="vocabularies differ: 16 student, 17 teacher"):
        linear_kl(hs, ws[:-1], ht, wt)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(("temperature", "ids"), [(1.0, V), (2.0, V), (1.0, V - 4)])
def test_several_terms_and_the_next_token_loss_in_one_pass(
    made: list[Tensor], chunk: int, temperature: float, ids: int
) -> None:
    """Beside each other as each by itself; ids beyond the teacher's count in the next-token loss alone."""
    hs, ws, bs, ht, wt = made
    student = [t.clone().requires_grad_() for t in (hs, ws, bs)]
    labels = torch.arange(N) % V
    logits = student[0] @ student[1].T + student[2]
    q = log_softmax(logits[:, :ids] / temperature, -1)
    p = log_softmax(ht @ wt[:ids].T / temperature, -1)
    kl, squares = kl_div(q, p, log_target=True, reduction="sum"), (p - q).square().sum()
    slow = 0.7 * kl + 0.2 * squares + 0.3 * cross_entropy(logits, labels, reduction="sum")
    got = linear_divergence(
        student[0],
        student[1],
        Projected(ht, Projection(wt[:ids], None, 0.0)),
        [Term(forward_kl, 0.7), Term(lambda p, q: ((p - q).square().sum(-1), 2 * (q - p)), 0.2)],
        bias_W=student[2],
        temperature=temperature,
        labels_N=labels,
        cross_entropy_weight=0.3,
        chunk=chunk,
    )
    torch.testing.assert_close(got.total, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.terms, torch.stack([kl, squares]).detach(), rtol=1e-12, atol=1e-12)
    assert got.agreed.item() == (p.argmax(-1) == q.argmax(-1)).sum().item()
    expected = torch.autograd.grad(slow, student)
    for mine, true in zip(torch.autograd.grad(got.total, student), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def coarse(log_all: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of these ids and of the rest."""
    listed = log_all.gather(-1, ids)
    return torch.cat([listed, torch.log1p(-listed.exp().sum(-1, keepdim=True))], -1)


@pytest.mark.parametrize("top", [1, 5, V - 1])
@pytest.mark.parametrize("way", ["projected", "listed"])
def test_the_likeliest_ids_and_the_rest(made: list[Tensor], top: int, way: str) -> None:
    hs, ws, _, ht, wt = made
    student = [t.clone().requires_grad_() for t in (hs, ws)]
    p = log_softmax(ht @ wt.T, -1)
    ids = p.topk(top, -1).indices
    q = coarse(log_softmax(student[0] @ student[1].T, -1), ids)
    slow = kl_div(q, coarse(p, ids), log_target=True, reduction="sum")
    target = (
        Projected(ht, Projection(wt, None, 0.0)) if way == "projected" else Listed(ids, coarse(p, ids), V)
    )
    got = linear_divergence(
        *student, target, [Term(forward_kl, 1.0, top if way == "projected" else 0)], chunk=4
    )
    torch.testing.assert_close(got.total, slow, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(slow, student)
    for mine, true in zip(torch.autograd.grad(got.total, student), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-10)


def test_ids_without_a_rest_as_samples_are(made: list[Tensor]) -> None:
    """What is listed twice counts twice."""
    hs, ws, *_ = made
    student = [t.clone().requires_grad_() for t in (hs, ws)]
    ids = torch.stack([torch.arange(N) % V, (torch.arange(N) * 3) % V, torch.zeros(N, dtype=torch.int64)], -1)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(N, 3)
    q = log_softmax(student[0] @ student[1].T, -1).gather(-1, ids)
    slow = (p * (p.log() - q)).sum()
    got = linear_divergence(*student, Listed(ids, p.log(), V), [Term(forward_kl)], chunk=4).total
    torch.testing.assert_close(got, slow, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(slow, student)
    for mine, true in zip(torch.autograd.grad(got, student), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_all_ids_listed_leave_no_rest(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    hs = hs.clone().requires_grad_()
    target = Projected(ht, Projection(wt, None, 0.0))
    whole, listed = (linear_divergence(hs, ws, target, [Term(forward_kl, 1.0, top)]).total for top in (0, V))
    torch.testing.assert_close(listed, whole, rtol=1e-10, atol=1e-10)
    for mine, true in zip(torch.autograd.grad(listed, hs), torch.autograd.grad(whole, hs), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-10)
    assert Outcomes(torch.zeros(1, V)).top(V).log_p_CO.isfinite().all()


def test_another_temperature_than_that_of_the_list_is_refused(made: list[Tensor]) -> None:
    hs, ws, *_ = made
    target = Listed(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1), V, temperature=2.0)
    with pytest.raises(ValueError, match=r"at temperature 2.0, asked for 1.0"):
        linear_divergence(hs, ws, target, [Term(forward_kl)])


@pytest.mark.parametrize("chunk", [0, 1, 5])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_cross_entropy_equals_torch(made: list[Tensor], chunk: int, cap: float) -> None:
    hs, ws, bs, *_ = (t.clone().requires_grad_() for t in made)
    labels = torch.arange(N) % V
    labels[::4] = -100
    slow = cross_entropy(softcapped(hs @ ws.T + bs, cap), labels, reduction="sum")
    expected = torch.autograd.grad(slow, (hs, ws, bs))
    got = linear_cross_entropy(hs, ws, labels, bias_V=bs, softcap=cap, chunk=chunk)
    torch.testing.assert_close(got, slow, rtol=1e-12, atol=1e-12)
    for mine, true in zip(torch.autograd.grad(got, (hs, ws, bs)), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_types(made: list[Tensor], dtype: torch.dtype, tolerance: float) -> None:
    hs, ws, _, ht, wt = made
    true = hs.clone().requires_grad_()
    slow = slow_kl(true, ws, torch.zeros(V, dtype=torch.float64), ht, wt, 1.0, 0.0)
    slow.backward()
    mine = hs.to(dtype).requires_grad_()
    got = linear_kl(mine, ws.float(), ht.to(dtype), wt.float(), chunk=3)
    got.backward()
    assert (got.dtype, mine.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(got.double(), slow, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine.grad.double(), true.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "divergence"])
def test_fp16_keeps_gradients_below_its_own_range(loss: str, autocast: bool) -> None:
    """A softmax over many tokens has entries under 6e-8 that fp16 would flush before they are scaled."""
    scale, unlikely = 2.0**20, math.exp(-24)
    hidden = torch.full((1, 2), 1.0, dtype=torch.float16).requires_grad_()
    head = torch.tensor([[8.0, 8.0], [-4.0, -4.0]], requires_grad=True)
    certain = Listed(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), 2)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        if loss == "divergence":
            made = linear_divergence(hidden, head, certain, [Term(forward_kl)]).total
        else:
            made = linear_cross_entropy(hidden, head, torch.tensor([0]))
    (scale * made).backward()
    assert unlikely < 6e-8
    assert head.grad[1, 0].item() == pytest.approx(scale * unlikely, rel=1e-2)
    assert hidden.grad[0, 0].item() == pytest.approx(-4 * scale * unlikely, rel=1e-2)


def test_a_gradient_of_the_gradient_is_refused(made: list[Tensor]) -> None:
    """It was computed on the spot, so it knows nothing of what it depends on."""
    hs, ws, _, ht, wt = made
    hs.requires_grad_()
    for loss in (linear_kl(hs, ws, ht, wt), linear_cross_entropy(hs, ws, torch.arange(N) % V)):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(scale * loss, hs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    """The biggest tensor made in forward and backward is far below N x V."""
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    biggest = max(biggest, t.numel())
            return out

    n, d, v = 512, 8, 1000
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    with Watch():
        linear_kl(hidden, head, torch.randn(n, d), torch.randn(v, d), chunk=16).backward()
        linear_cross_entropy(hidden, head, torch.zeros(n, dtype=torch.long), chunk=16).backward()
    assert biggest <= 16 * v


def test_registered_as_torch_asks(made: list[Tensor]) -> None:
    hs, ws, *_ = (t.float() for t in made)
    args = (hs.requires_grad_(), ws, None, torch.arange(N) % V, 0.0, 0, True)
    torch.library.opcheck(
        torch.ops.compresskit.linear_cross_entropy.default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_table_can_be_printed_and_tells_what_ran(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    dispatch.forget()
    linear_kl(hs, ws, ht, wt)
    assert dispatch.used() == {"linear_divergence": "reference"}
    lines = dispatch.table().splitlines()
    assert any("linear_divergence" in line and "cpu" in line and "reference" in line for line in lines)
    with pytest.raises(EngineError, match="tensors on cpu, cuda"):
        dispatch.choose("linear_divergence", "xla")
