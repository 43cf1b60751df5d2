"""A packed linear layer against the dense one it stands for: outputs, gradients, devices, types, state."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compresskit.errors import FormatError
from compresskit.kernels.bitmap import Bitmap, pack, unpack
from compresskit.kernels.choice import CLASSES, Choice, Wish, table
from compresskit.modeling import sparse_linear
from compresskit.modeling.sparse_linear import SparseLinear, choices_of

BITMAP, DENSE = Wish(layout="bitmap"), Wish(layout="dense")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))


def weight(dtype: torch.dtype = torch.float32, rows: int = 12, inputs: int = 70) -> Bitmap:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, inputs, generator=generator) < 0.4
    return pack((torch.randn(rows, inputs, generator=generator) * keep).to(dtype))


def integers(rows: int = 12, inputs: int = 70, groups: int = 2) -> Bitmap:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-9, 10, (rows, inputs), generator=generator).clamp(min=0).to(torch.int8)
    return pack(q, torch.rand(rows, groups, generator=generator) + 0.01)


def layer(made: Bitmap, wish: Wish | None = BITMAP, **more: object) -> SparseLinear:
    bias = torch.arange(float(made.out_features))
    found = SparseLinear.of(made, bias, **more)  # type: ignore[arg-type]
    if wish is not None:
        found.settle(wish)
    return found


def same(a: Bitmap, b: Bitmap) -> bool:
    scales = a.scales_OG is b.scales_OG is None or torch.equal(a.scales_OG, b.scales_OG)  # type: ignore[arg-type]
    return bool(scales) and torch.equal(a.mask_OB, b.mask_OB) and torch.equal(a.values_K, b.values_K)


def near(got: Tensor, expected: Tensor) -> bool:
    """Up to a few roundings of the type."""
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(
        got.float(), expected.float(), rtol=8 * eps, atol=8 * eps * float(expected.detach().abs().max())
    )


@pytest.mark.parametrize("wish", [BITMAP, DENSE], ids=["bitmap", "dense"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 5, 70), (0, 70), (2, 0, 70), (100, 70)])
def test_it_computes_what_the_dense_layer_does(
    wish: Wish, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    made = layer(weight(dtype), wish)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = made(x)
    assert (got.dtype, tuple(got.shape)) == (dtype, (*shape[:-1], 12))
    if got.numel():
        assert made.bias is not None
        assert near(got, linear(x, unpack(weight(dtype)), made.bias))
        turned = made(x.transpose(0, -1).contiguous().transpose(0, -1))
        assert near(turned, got), "strides do not matter"


@pytest.mark.parametrize("wish", [BITMAP, DENSE], ids=["bitmap", "dense"])
def test_integers_and_their_scales(wish: Wish) -> None:
    made = layer(integers(), wish, dtype=torch.bfloat16)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert near(made(x), linear(x, unpack(integers(), torch.bfloat16), made.bias))
    assert same(made.bitmap(), integers()), "integers come back, whatever multiplies"
    state = made.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {
        "bias": torch.bfloat16,
        "mask": torch.uint8,
        "values": torch.int8,
        "scales": torch.float32,
        "weight": torch.int64,
    }
    assert state["weight"].tolist() == [12, 70]
    half = made.to(torch.float16)
    assert same(half.bitmap(), integers())
    assert half(x.half()).dtype == torch.float16
    assert half.layer.dtype == "float16"


@pytest.mark.parametrize("wish", [BITMAP, DENSE], ids=["bitmap", "dense"])
def test_gradients_of_inputs_and_bias(wish: Wish) -> None:
    made = layer(weight(), wish)
    plain = nn.Linear(70, 12)
    assert made.bias is not None
    plain.weight.data, plain.bias.data = unpack(weight()), made.bias.detach().clone()
    x = torch.randn(4, 70, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    made(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    assert made.bias.grad is not None
    assert torch.allclose(made.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not made(x).requires_grad
    assert [name for name, _ in made.named_parameters()] == ["bias"]


@pytest.mark.parametrize("wish", [BITMAP, DENSE], ids=["bitmap", "dense"])
def test_autocast_gives_its_own_type(wish: Wish) -> None:
    made = layer(weight(), wish)
    x = torch.randn(4, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made(x)
        again = made(x.bfloat16())
    assert got.dtype == again.dtype == torch.bfloat16
    assert torch.allclose(got.float(), made(x), rtol=2e-2, atol=0.1)


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"SparseLinear of torch.float32 was given inputs of torch.bfloat16"
    ):
        layer(weight())(torch.zeros(1, 70, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"call settle\(\)"):
        layer(weight(), None)(torch.zeros(1, 70))


def mixed(monkeypatch: pytest.MonkeyPatch, *steps: str) -> SparseLinear:
    """A layer that multiplies by these steps, one for each class of batches."""
    made = layer(weight(), None)
    monkeypatch.setattr(sparse_linear, "choose", lambda *_, **__: Choice(steps=steps))
    made.settle()
    return made


def test_each_class_of_batches_takes_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixed(monkeypatch, "bitmap", "bitmap expanded", "dense", "bitmap", "bitmap expanded")
    assert {name.rpartition("_")[0] for name in made._buffers} == {"bitmap", "dense"}
    called: list[str] = []
    product = SparseLinear._product
    monkeypatch.setattr(
        SparseLinear, "_product", lambda self, step, x: (called.append(step), product(self, step, x))[1]
    )
    for tokens in (1, 3, 9, 40, 200):
        x = torch.randn(tokens, 70, requires_grad=True)
        got, expected = made(x), linear(x, unpack(weight()), made.bias)
        assert near(got, expected)
        (mine,) = torch.autograd.grad(got.sum(), x)
        assert near(mine, torch.autograd.grad(expected.sum(), x)[0])
    assert called == ["bitmap", "bitmap expanded", "bitmap", "bitmap expanded"]


def test_compiled_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixed(monkeypatch, "bitmap", "bitmap", "bitmap expanded", "dense", "dense")
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for tokens in (1, 8, 30):
        x = torch.randn(tokens, 70)
        assert near(compiled(x), made(x))
    x = torch.randn(1, 70, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("wish", [None, BITMAP, DENSE], ids=["neutral", "bitmap", "dense"])
def test_state_is_neutral_and_loads_again(wish: Wish | None) -> None:
    made = layer(weight(), wish)
    state = made.state_dict()
    assert set(state) == {"mask", "values", "bias", "weight"}
    assert same(made.bitmap(), weight())
    assert torch.equal(state["values"], weight().values_K)
    other = pack(torch.randn(12, 70, generator=torch.Generator().manual_seed(9)).relu())
    target = layer(other, wish)
    assert target.load_state_dict(state).missing_keys == []
    assert same(target.bitmap(), weight())
    assert (target.choice is None) == (wish is None)
    if wish is not None:
        x = torch.randn(2, 70)
        assert torch.equal(target(x), made(x))
    state["values"].zero_()
    assert same(target.bitmap(), weight()), "it keeps tensors of its own"


def test_state_that_contradicts_itself_is_not_taken() -> None:
    made = layer(weight())
    state = made.state_dict()
    state["mask"] = state["mask"] ^ 1
    with pytest.raises(RuntimeError, match="a value for each of"):
        made.load_state_dict(state)
    assert same(made.bitmap(), weight())
    with pytest.raises(RuntimeError, match=r"weight: expected \[12, 70\], got \[12, 72\]"):
        made.load_state_dict({**made.state_dict(), "weight": torch.tensor([12, 72])})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "values"'):
        made.load_state_dict({k: v for k, v in made.state_dict().items() if k != "values"})
    with pytest.raises(RuntimeError, match=r'Missing key.* "bias"'):
        made.load_state_dict({k: v for k, v in made.state_dict().items() if k != "bias"})


def test_what_contradicts_itself_is_not_settled() -> None:
    broken = layer(replace(weight(), values_K=weight().values_K * torch.nan), None)
    with pytest.raises(FormatError, match="weight values: expected finite numbers"):
        broken.settle(BITMAP)


@pytest.mark.parametrize("wish", [None, BITMAP, DENSE], ids=["neutral", "bitmap", "dense"])
def test_other_types_and_devices(wish: Wish | None) -> None:
    made = layer(weight(), wish)
    narrow = copy.deepcopy(made).to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.bias is not None
    assert narrow.bias.dtype == torch.bfloat16
    assert torch.equal(narrow.bitmap().values_K, weight().values_K.bfloat16())
    assert torch.equal(narrow.weight, unpack(weight()).bfloat16())
    assert same(made.bitmap(), weight()), "the copy alone"
    if wish is not None:
        assert narrow(torch.zeros(1, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(FormatError, match="expected a type that a layout holds, got float64"):
        made.double()
    assert same(made.bitmap(), weight())
    assert torch.equal(made.weight, unpack(weight()))
    gone = made.to("meta")
    assert gone.device.type == "meta"
    assert gone.weight.shape == (12, 70)
    assert set(gone.state_dict()) == {"mask", "values", "bias"}


@pytest.mark.parametrize("wish", [None, BITMAP], ids=["neutral", "bitmap"])
def test_the_type_it_has_already_leaves_scales_as_they_are(wish: Wish | None) -> None:
    made = layer(integers(), wish, dtype=torch.bfloat16)
    before = made.bitmap()
    made.to(torch.bfloat16)
    assert same(made.bitmap(), before)
    assert made.state_dict()["scales"].dtype == torch.float32


def test_inputs_of_another_width_are_refused() -> None:
    for wish in (BITMAP, DENSE):
        with pytest.raises(RuntimeError, match="of 70 inputs was given 96"):
            layer(weight(), wish)(torch.zeros(2, 96))


def test_it_survives_pickle() -> None:
    made = layer(weight())
    again = pickle.loads(pickle.dumps(made))
    x = torch.randn(3, 70)
    assert torch.equal(again(x), made(x))


def test_values_that_are_zero_stay_kept() -> None:
    made = weight()
    made.values_K[3] = 0
    for wish in (BITMAP, DENSE):
        assert same(layer(made, wish).bitmap(), made)


def test_it_says_what_it_is() -> None:
    said = repr(layer(weight()))
    assert said.startswith("SparseLinear(in_features=70, out_features=12, bias=True, zeros=")
    assert said.endswith("%, bitmap)")
    assert repr(layer(weight(), None)).endswith("not settled)")
    model = nn.Sequential(layer(weight()), layer(weight(), None))
    assert set(choices_of(model)) == {"0"}
    assert table(choices_of(model)) == "0: bitmap"
    assert choices_of(model)["0"].steps == ("bitmap",) * len(CLASSES)
