"""The fused losses against the slow, whole-logits formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compresskit.errors import EngineError
from compresskit.kernels import dispatch
from compresskit.kernels.ops import linear_cross_entropy, linear_kl

N, D, E, V = 13, 6, 5, 17


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
        student_bias_V=student[2],
        temperature=temperature,
        student_softcap=cap,
        chunk=chunk,
    )
    torch.testing.assert_close(got, slow, rtol=1e-12, atol=1e-12)
    for mine, true in zip(torch.autograd.grad(3 * got, student), expected, strict=True):
        torch.testing.assert_close(mine, 3 * true, rtol=1e-10, atol=1e-12)


def test_kl_gradcheck(made: list[Tensor]) -> None:
    hs, ws, bs, ht, wt = (t[:5].clone() for t in made)
    inputs = (hs.requires_grad_(), ws.requires_grad_(), bs.requires_grad_())

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kl(h, w, ht, wt, student_bias_V=b, temperature=1.7, student_softcap=4.0, chunk=2)

    assert torch.autograd.gradcheck(loss, inputs)


def test_masked_tokens_do_not_count(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    hs = hs.clone().requires_grad_()
    keep = torch.arange(N) % 3 != 0
    linear_kl(hs, ws, ht, wt, keep_N=keep).backward()
    assert hs.grad is not None
    assert torch.equal((hs.grad != 0).any(-1), keep)
    none = linear_kl(hs, ws, ht, wt, keep_N=torch.zeros(N, dtype=torch.bool))
    assert none.item() == 0
    none.backward()


def test_kl_of_itself_is_zero(made: list[Tensor]) -> None:
    hs, ws, *_ = made
    assert abs(linear_kl(hs, ws, hs, ws).item()) < 1e-12


def test_different_vocabularies_are_refused(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    with pytest.raises(ValueError, match="vocabularies differ: 17 student, 16 teacher"):
        linear_kl(hs, ws, ht, wt[:-1])


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


def test_fp16_keeps_gradients_below_its_own_range() -> None:
    """A softmax over many tokens has entries under 6e-8 which fp16 would flush to zero."""
    hidden = torch.full((1, 2), 1.0, dtype=torch.float16).requires_grad_()
    head = torch.tensor([[8.0, 8.0], [-4.0, -4.0]], requires_grad=True)
    linear_cross_entropy(hidden, head, torch.tensor([0])).backward()
    assert 0 < head.grad[1, 0].item() < 6e-8


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
    hs, ws, _, ht, wt = (t.float() for t in made)
    args = (hs.requires_grad_(), ws, None, ht, wt, None, 1.0, 0.0, 0.0, 0, True)
    torch.library.opcheck(
        torch.ops.compresskit.linear_kl.default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_table_can_be_printed_and_tells_what_ran(made: list[Tensor]) -> None:
    hs, ws, _, ht, wt = made
    dispatch.forget()
    linear_kl(hs, ws, ht, wt)
    assert dispatch.used() == {"linear_kl": "reference"}
    lines = dispatch.table().splitlines()
    assert any("linear_kl" in line and "cpu" in line and "reference" in line for line in lines)
    with pytest.raises(EngineError, match="tensors on cpu, cuda"):
        dispatch.choose("linear_kl", "xla")
