"""Kept weights that learn under their mask, against a dense layer whose gradients are masked."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import compresskit as ck
from compresskit.errors import FormatError
from compresskit.kernels import dispatch
from compresskit.kernels.bitmap import Bitmap, pack, unpack, unpack_bits
from compresskit.kernels.choice import Wish
from compresskit.modeling.sparse_linear import SparseLinear, sparse_layers
from tests.tiny import tiny_llama

TYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT, IN = 12, 70


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESSKIT_LAYOUT", "dense")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(dtype: torch.dtype = torch.float32, seed: int = 0) -> Bitmap:
    """Some rows of it keep nothing."""
    keep = (draw(OUT, IN, seed=seed) > 0.3) & (torch.arange(OUT) % 4 != 2)[:, None]
    return pack((draw(OUT, IN, seed=seed + 1) * keep).to(dtype))


def layer(made: Bitmap | None = None) -> SparseLinear:
    made = weight() if made is None else made
    return SparseLinear.of(made, torch.arange(float(made.out_features)) / 8)


def twin(made: Bitmap) -> tuple[nn.Linear, Tensor]:
    """The dense layer, whose gradients have zeros where nothing is kept, and what is kept."""
    plain = nn.Linear(IN, OUT, dtype=made.values_K.dtype)
    keep = unpack_bits(made.mask_OB, IN)
    with torch.no_grad():
        plain.weight.copy_(unpack(made))
        plain.bias.copy_(torch.arange(float(OUT)) / 8)
    plain.weight.register_hook(lambda grad: grad * keep)
    return plain, keep


def near(got: Tensor, expected: Tensor, units: int = 8) -> bool:
    eps = units * torch.finfo(expected.dtype).eps
    most = float(expected.detach().abs().max())
    return torch.allclose(got.float(), expected.float(), rtol=eps, atol=eps * most)


Optimiser = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMISERS: dict[str, Optimiser] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-4),  # 1e-8 is 0 in float16
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_five_steps_are_those_of_a_dense_layer_with_masked_gradients(dtype: torch.dtype, name: str) -> None:
    made, (plain, keep) = layer(weight(dtype)), twin(weight(dtype))
    values = made.train_values()
    assert made.train_values() is values
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"values", "bias"}
    one, other = OPTIMISERS[name]([*made.parameters()]), OPTIMISERS[name]([*plain.parameters()])
    for step in range(5):
        x = draw(8, IN, seed=step).to(dtype)
        for module, optimiser in ((made, one), (plain, other)):
            optimiser.zero_grad()
            (module(x) - x[:, :OUT]).square().mean().backward()
        assert values.grad is not None
        assert plain.weight.grad is not None
        if step == 0:
            assert near(values.grad, plain.weight.grad[keep])
        one.step()
        other.step()
    assert not torch.equal(values, weight(dtype).values_K)
    assert near(values, plain.weight[keep], units=64)
    assert torch.equal(made.bitmap().mask_OB, weight().mask_OB)
    assert torch.equal(unpack(made.bitmap()) != 0, keep)
    assert near(made.weight, plain.weight, units=64)
    assert made.bias is not None
    assert near(made.bias, plain.bias, units=64)
    made.settle(Wish(layout="bitmap"))
    assert [*dict(made.named_parameters())] == ["bias"]
    assert torch.equal(made.bitmap().values_K, values.detach()), "what was learnt is packed"


def test_steps_copy_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    values, seen = made.train_values(), list[int]()
    run = dispatch.implementation

    def watched(op: str, device: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.extend(
                a.data_ptr() for a in args if isinstance(a, Tensor) and a.dim() == 1 and a is not args[-1]
            )
            return run(op, device)(*args)

        return call

    monkeypatch.setattr("compresskit.kernels.packed.rules.implementation", watched)
    optimiser = torch.optim.SGD([values], lr=0.1)
    for _ in range(2):
        made(draw(2, IN)).sum().backward()
        optimiser.step()
    assert seen.count(values.data_ptr()) == 4, "two products and two gradients, all on the parameter itself"
    room = values.untyped_storage().nbytes() - values.nbytes
    assert room == 64, "and so no kernel has to copy it for its slack"


def test_what_is_saved_for_the_gradient_is_packed() -> None:
    made = layer()
    values, saved = made.train_values(), list[Tensor]()

    def keeping(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keeping, lambda tensor: tensor):
        made(draw(2, IN))
    assert max(t.numel() for t in saved) == values.numel() == len(weight().values_K) < OUT * IN


def test_gradients_of_inputs_and_bias_and_no_rows_at_all() -> None:
    made, (plain, keep) = layer(), twin(weight())
    values = made.train_values()
    for shape in ((0, IN), (2, 0, IN), (3, 5, IN), (IN,), (100, IN)):
        x, y = (draw(*shape).requires_grad_() for _ in range(2))
        made.zero_grad()
        plain.zero_grad()
        made(x).square().sum().backward()
        plain(y).square().sum().backward()
        assert made.bias is not None
        assert plain.weight.grad is not None
        pairs = (x.grad, y.grad), (made.bias.grad, plain.bias.grad), (values.grad, plain.weight.grad[keep])
        for got, expected in pairs:
            assert got is not None
            assert expected is not None
            assert got.shape == expected.shape
            assert not got.numel() or near(got, expected, units=32)


def test_a_layer_that_keeps_nothing_learns_its_bias_alone() -> None:
    made = layer(pack(torch.zeros(3, 9)))
    values = made.train_values()
    made(draw(4, 9)).sum().backward()
    assert values.grad is not None
    assert values.grad.shape == (0,)
    assert made.bias is not None
    assert torch.equal(made.bias.grad, torch.full((3,), 4.0))  # type: ignore[arg-type]


def test_compiled_it_learns_the_same() -> None:
    made = layer()
    values, x = made.train_values(), draw(6, IN)
    made(x).square().sum().backward()
    assert values.grad is not None
    wanted, values.grad = values.grad, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        compiled(x).square().sum().backward()
    assert torch.equal(values.grad, wanted)  # type: ignore[arg-type]


def test_autocast_multiplies_in_the_type_of_the_values() -> None:
    made = layer()
    values = made.train_values()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(draw(6, IN).bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32
    expected = draw(6, IN).bfloat16().float().sum(0).expand(OUT, IN)[unpack_bits(weight().mask_OB, IN)]
    assert near(values.grad, expected)


def test_its_state_is_neutral_and_loads_into_the_same_parameter() -> None:
    made = layer()
    values = made.train_values()
    with torch.no_grad():
        values.mul_(2)
    state = made.state_dict()
    assert set(state) == {"mask", "values", "bias", "weight"}
    assert torch.equal(state["values"], 2 * weight().values_K)
    assert state["values"].untyped_storage().nbytes() == values.nbytes
    assert not state["values"].requires_grad
    other = layer()
    theirs = other.train_values()
    other.load_state_dict(state)
    assert other.train_values() is theirs
    assert torch.equal(other(draw(3, IN)), made(draw(3, IN)))
    state["values"].zero_()
    assert torch.equal(theirs, values), "it keeps tensors of its own"
    settled = layer()
    settled.settle()
    settled.load_state_dict(made.state_dict())
    assert near(settled(draw(3, IN)), made(draw(3, IN)))


def test_another_mask_is_not_loaded_while_it_learns() -> None:
    made = layer()
    values = made.train_values()
    before = values.detach().clone()
    state = layer(weight(seed=5)).state_dict()
    with pytest.raises(RuntimeError, match=r"mask: values are trained under another one; call settle\(\)"):
        made.load_state_dict(state)
    assert torch.equal(values, before)
    made.settle()
    made.load_state_dict(state)
    assert torch.equal(made.bitmap().mask_OB, state["mask"])


def test_integers_are_not_trained() -> None:
    q = torch.ones(OUT, IN, dtype=torch.int8)
    made = SparseLinear.of(pack(q, torch.ones(OUT, 1)), dtype=torch.float32)
    with pytest.raises(FormatError, match="expected floating values, got int8 ones, to be trained"):
        made.train_values()
    assert made.choice is None, "as it was"


def test_what_is_not_finite_is_not_settled_again() -> None:
    made = layer()
    with torch.no_grad():
        made.train_values().mul_(torch.inf)
    with pytest.raises(FormatError, match="weight values: expected finite numbers"):
        made.settle()
    assert "values" in dict(made.named_parameters())


def test_another_type_and_device_leave_the_parameter_what_it_is() -> None:
    made = layer()
    values = made.train_values()
    made(draw(2, IN)).sum().backward()
    assert made.to(torch.float32).train_values() is values
    assert values.untyped_storage().nbytes() > values.nbytes
    narrow = made.to(torch.bfloat16)
    assert narrow.train_values() is values
    assert values.dtype == torch.bfloat16
    assert values.grad is not None
    assert values.grad.dtype == torch.bfloat16
    assert torch.equal(values, weight().values_K.bfloat16())
    x = draw(2, IN).bfloat16()
    assert near(made(x), linear(x, unpack(weight(torch.bfloat16)), made.bias))
    gone = made.to("meta")
    assert set(gone.state_dict()) == {"mask", "values", "bias"}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_learn_alone(way: Callable[[SparseLinear], SparseLinear]) -> None:
    made = layer()
    values = made.train_values()
    again = way(made)
    theirs = again.train_values()
    assert theirs is not values
    again(draw(2, IN)).sum().backward()
    assert values.grad is None
    with torch.no_grad():
        theirs.zero_()
    assert torch.equal(values, weight().values_K)
    assert near(again(draw(2, IN)), again.bias.expand(2, OUT))  # type: ignore[union-attr]


def test_transformers_own_trainer_trains_a_packed_checkpoint_and_saves_it_so(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", hidden_size=64)
    recipe = ck.Recipe(model=str(tmp_path / "model"), stages=(ck.Prune("magnitude", pattern="60%"),))
    ck.run(recipe, tmp_path / "dense", measures=())
    ck.export(tmp_path / "dense", to="bitmask", out=tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    layers = sparse_layers(model)
    before = {name: found.bitmap() for name, found in layers.items()}
    for found in layers.values():
        found.train_values()
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)}] * 8
    settings = {"max_steps": 4, "save_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = TrainingArguments(str(tmp_path / "out"), **settings, use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    for name, found in sparse_layers(again).items():
        assert torch.equal(found.bitmap().mask_OB, before[name].mask_OB)
        assert not torch.equal(found.bitmap().values_K, before[name].values_K)
    tokens = torch.arange(20)[None]
    assert torch.allclose(again(tokens).logits, model.eval()(tokens).logits, atol=1e-5)
