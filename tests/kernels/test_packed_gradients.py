"""Gradients of packed values are the dense weight's at the kept places, and nothing dense is made for them.

Shapes: O = outputs, I = inputs, N = tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskit.errors import EngineError
from compresskit.kernels import chunking
from compresskit.kernels.bitmap import Bitmap, pack, unpack, unpack_bits
from compresskit.kernels.dispatch import reference, refusal
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import SLACK_BYTES
from tests.kernels.packed_cases import SHAPES, ZEROS, draw, weight

CPU = torch.device("cpu")
VALUES = {"bitmap": 1, "two_four": 0}
"""Layout whose values have a gradient -> which of its tensors they are."""
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaf(name: str, packed: Bitmap) -> tuple[list[Tensor], Tensor]:
    """The tensors of layout ``name``, and those of them that are the values, which ask for a gradient."""
    tensors = list(LAYOUTS[name]().pack(packed, CPU))
    values = tensors[VALUES[name]].requires_grad_()
    return tensors, values


def at_kept(name: str, tensors: list[Tensor], found: Tensor, width: int) -> Tensor:
    """The numbers of ``found``, which lie as values do, in the neutral order."""
    moved = [t.detach() for t in tensors]
    moved[VALUES[name]] = found
    return LAYOUTS[name]().unpack(tuple(moved), width).values_K


def dense(packed: Bitmap, x: Tensor, grad: Tensor) -> Tensor:
    """The slow way, in float64: autograd on the dense weight, looked at where it is kept."""
    weight_OI = unpack(packed).double().requires_grad_()
    (found,) = torch.autograd.grad(x.double() @ weight_OI.T, weight_OI, grad.double())
    return found[unpack_bits(packed.mask_OB, packed.in_features)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("name", "zeros"), [*(("bitmap", zeros) for zeros in ZEROS), ("two_four", "2:4")])
def test_they_are_the_dense_gradient_at_the_kept_places(name: str, dtype: torch.dtype, zeros: str) -> None:
    for shape in SHAPES:
        packed = weight(shape, torch.float32, zeros)
        packed = replace(packed, values_K=packed.values_K.to(dtype))
        tensors, values = leaf(name, packed)
        for batch in ((0,), (1,), (2, 3), (70,), ()):
            x, bias = draw((*batch, shape[1]), 4).to(dtype), draw((shape[0],), 5).to(dtype)
            y = LAYOUTS[name]().linear(x, tuple(tensors), bias)
            grad = draw(tuple(y.shape), 6).to(dtype)
            (found,) = torch.autograd.grad(y, values, grad)
            assert (found.dtype, found.shape) == (dtype, values.shape)
            got = at_kept(name, tensors, found, shape[1])
            assert found.count_nonzero() == got.count_nonzero(), "slack and filling have none"
            rows_x, rows_grad = x.reshape(-1, shape[1]), grad.reshape(-1, shape[0])
            wanted, sizes = (
                dense(packed, *p) for p in ((rows_x, rows_grad), (rows_x.abs(), rows_grad.abs()))
            )
            most = torch.finfo(dtype).eps * wanted.abs() + 4 * torch.finfo(torch.float32).eps * sizes
            assert bool(((got.double() - wanted).abs() <= most + torch.finfo(dtype).smallest_normal).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_values_wider_than_inputs_lose_nothing(name: str, dtype: torch.dtype) -> None:
    packed = weight((33, 200), torch.float32, "2:4")
    tensors, values = leaf(name, packed)
    x, grad = draw((50, 200), 4).to(dtype), draw((50, 33), 6).to(dtype)
    (found,) = torch.autograd.grad(LAYOUTS[name]().linear(x, tuple(tensors), None), values, grad)
    assert found.dtype == torch.float32
    got = at_kept(name, tensors, found, 200).double()
    torch.testing.assert_close(got, dense(packed, x, grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VALUES)
def test_all_of_them_in_float64(name: str) -> None:
    tensors, _ = leaf(name, weight((6, 20), torch.float32, "2:4"))
    at, op = VALUES[name], getattr(torch.ops.compresskit, f"{name}_linear")
    kept = at_kept(name, tensors, torch.ones_like(tensors[at].detach()), 20).bool()
    x, bias = draw((3, 20), 4).double().requires_grad_(), draw((6,), 5).double().requires_grad_()
    start = tensors[at].detach().double()
    filling = at_kept(name, tensors, torch.arange(1.0, len(start) + 1), 20)[kept].long() - 1

    def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        placed = start.scatter(0, filling, values)
        return op(x, *tensors[:at], placed, *tensors[at + 1 :], bias)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(product, (x, start[filling].requires_grad_(), bias))


class Sizes(TorchDispatchMode):
    """Bytes of everything that is made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.most_bytes = max(self.most_bytes, tensor.nbytes)
        return made


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("name", VALUES)
def test_rows_at_a_time_equal_the_whole(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight((48, 200), torch.float32, "2:4")
    tensors, _ = leaf(name, packed)
    x, grad = (draw(shape, 7).mul(8).round() for shape in ((5, 200), (5, 48)))
    run = reference(f"{name}_gradient")
    whole = run(grad, x, *tensors)
    monkeypatch.setitem(chunking.BLOCK_ELEMENTS, "cpu", rows * 200)
    assert chunking.gradient_rows(200, "cpu") == rows
    assert torch.equal(run(grad, x, *tensors), whole), "sums of whole numbers are exact in any order"
    assert torch.equal(at_kept(name, tensors, whole, 200).double(), dense(packed, x, grad))


@pytest.mark.parametrize("name", VALUES)
def test_no_dense_gradient_is_made(name: str) -> None:
    shape, x = (2048, 2048), torch.ones(2, 2048)
    keep = torch.arange(2048) % 4 == torch.arange(2048)[:, None] % 4
    tensors, values = leaf(name, pack(keep.float()))
    dense_bytes = 4 * shape[0] * shape[1]
    with torch.no_grad(), Sizes() as sizes:
        reference(f"{name}_gradient")(torch.ones(2, 2048), x, *tensors)
    chunk_bytes = 4 * chunking.gradient_rows(2048, "cpu") * 2048
    assert sizes.most_bytes == max(values.nbytes, chunk_bytes) < dense_bytes
    saved: list[int] = []

    def keeping(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keeping, lambda tensor: tensor):
        y = LAYOUTS[name]().linear(x, tuple(tensors), None)
    assert max(saved) == values.nbytes
    assert sum(saved) == sum(t.nbytes for t in tensors) + x.nbytes
    y.sum().backward()
    assert values.grad is not None


def test_inputs_are_kept_for_values_alone() -> None:
    tensors, values = leaf("bitmap", weight((16, 64), torch.float32))
    x, saved = draw((500, 64), 4).requires_grad_(), list[tuple[int, ...]]()

    def keeping(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    for trained in (True, False):
        saved.clear()
        values.requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(keeping, lambda tensor: tensor):
            LAYOUTS["bitmap"]().linear(x, tuple(tensors), None)
        assert ((500, 64) in saved) == trained


def test_sums_are_not_made_narrow_by_autocast() -> None:
    tensors, _ = leaf("bitmap", weight((16, 64), torch.float32))
    x, grad = draw((9, 64), 4), draw((9, 16), 6)
    op = torch.ops.compresskit.bitmap_gradient
    with torch.no_grad():
        wanted = op(grad, x, *tensors)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(grad, x, *tensors), wanted)


@pytest.mark.parametrize("name", VALUES)
def test_their_op_is_what_torch_expects_and_compiles(name: str) -> None:
    tensors, values = leaf(name, weight((16, 64), torch.float32, "2:4"))
    x, grad = draw((3, 64), 4), draw((3, 16), 6)
    frozen = [t.detach() for t in tensors]
    torch.library.opcheck(getattr(torch.ops.compresskit, f"{name}_gradient").default, (grad, x, *frozen))
    op = getattr(torch.ops.compresskit, f"{name}_linear")
    torch.library.opcheck(op.default, (x, *tensors, None))

    def layer(x: Tensor) -> Tensor:
        return torch.relu(op(x, *tensors, None)) + 1

    (wanted,) = torch.autograd.grad(layer(x).sum(), values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        (found,) = torch.autograd.grad(compiled(x).sum(), values)
    assert torch.equal(found, wanted)


Ask = Callable[[list[Tensor]], Tensor]


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("bitmap", lambda t: t[3]),
        ("two_four", lambda t: t[2]),
        ("block", lambda t: t[0]),
        ("fragment", lambda t: next(part for part in t if part.is_floating_point())),
        ("gap", lambda t: next(part for part in t if part.is_floating_point())),
        ("tile", lambda t: t[2]),
    ],
)
def test_what_has_no_gradient_refuses_to_be_asked_for_one(name: str, ask: Ask) -> None:
    dtype = torch.float32 if name in VALUES else torch.bfloat16
    tensors = list(LAYOUTS[name]().pack(weight((16, 64), dtype, "2:4"), CPU))
    ask(tensors).requires_grad_()
    x = draw((2, 64), 4).to(dtype)
    with pytest.raises(EngineError, match=f"{name}_linear: expected .* got 1 packed tensors that do"):
        LAYOUTS[name]().linear(x, tuple(tensors), None)
    with torch.no_grad():
        LAYOUTS[name]().linear(x, tuple(tensors), None)


@pytest.mark.skipif(bool(refusal("cpu", "bitmap_linear")), reason="there is no C compiler")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_may_come_without_their_slack(dtype: torch.dtype) -> None:
    packed = weight((33, 200), torch.float32, "most")
    packed = replace(packed, values_K=packed.values_K.to(dtype))
    words, values, *rest = LAYOUTS["bitmap"]().pack(packed, CPU)
    op, expand = torch.ops.compresskit.bitmap_linear, torch.ops.compresskit.bitmap_expand
    kept = len(packed.values_K)
    assert len(values) * dtype.itemsize == kept * dtype.itemsize + SLACK_BYTES
    for given in (values[:kept], values[:kept].clone(), torch.cat([values, values])[-len(values) :][:kept]):
        for tokens in (1, 80):
            x = draw((tokens, 200), 4).to(dtype)
            assert torch.equal(op(x, words, given, *rest, None), op(x, words, values, *rest, None))
        assert torch.equal(expand(words, given, *rest, 200, dtype), unpack(packed, dtype))
    for short in (values[: kept - 1], values[: kept - 1].clone()):
        with pytest.raises(ValueError, match="64 bytes after them"):
            op(x, words, short, *rest, None)
