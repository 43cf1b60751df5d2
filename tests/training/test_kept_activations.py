"""What is kept for the backward pass: less in each mode, with the same gradients to the bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from compresskit.training import activations
from compresskit.training.activations import offloading, saving_activations
from compresskit.training.fields import TrainingFields
from compresskit.training.outlook import kept_per_token
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "second": {"activation_checkpointing": True, "checkpoint_blocks": 2},
    "operators": {"activation_checkpointing": True, "checkpoint_operators": True},
    "second-operators": {
        "activation_checkpointing": True,
        "checkpoint_blocks": 2,
        "checkpoint_operators": True,
    },
    "full": {"activation_checkpointing": True},
    "offload": {"offload_activations": True},
    "full-offload": {"activation_checkpointing": True, "offload_activations": True},
    "operators-offload": {
        "activation_checkpointing": True,
        "checkpoint_operators": True,
        "offload_activations": True,
    },
}


class Alive(TorchDispatchMode):
    """Counts the bytes that operators made, and that something still holds, beside a model's parameters."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}
        self._seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:  # a view of a weight is no activation
                    self._seen[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return made

    def total_bytes(self) -> int:
        gc.collect()
        return sum(size for ref, size in self._seen.values() if ref() is not None)


def six_blocks(make_model: Make) -> LlamaForCausalLM:
    return make_model(num_hidden_layers=6, hidden_size=32, intermediate_size=64).train()


@pytest.mark.parametrize("mode", ["full", "full-offload"])
def test_a_block_that_a_pipeline_lets_go_of_is_gone(make_model: Make, mode: str) -> None:
    model = six_blocks(make_model)
    with saving_activations(model, TrainingFields(**MODES[mode])):
        gone = weakref.ref(model.model.layers[5])
        model.model.layers[5] = torch.nn.Identity()
        gc.collect()
        assert gone() is None


def kept(model: LlamaForCausalLM, mode: str) -> tuple[int, dict[str, Tensor]]:
    """Bytes alive between the two passes in that mode, and the gradients."""
    ids = torch.arange(4 * 32).reshape(4, 32) % 48
    with saving_activations(model, TrainingFields(**MODES[mode])), Alive(model) as alive:
        hidden = model.model(input_ids=ids, use_cache=False)[0]
        total = alive.total_bytes()
        hidden.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, gradients


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are copied as those of a GPU are."""
    monkeypatch.setattr(activations, "offloading", partial(offloading, from_cpu=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_to_the_bit(mode: str, make_model: Make, copies: None) -> None:
    model = six_blocks(make_model)
    _, true = kept(model, "none")
    _, found = kept(model, mode)
    assert found.keys() == true.keys()
    for name, gradient in true.items():
        assert torch.equal(found[name], gradient), name


def test_each_mode_keeps_less_than_the_one_before(make_model: Make) -> None:
    model = six_blocks(make_model)
    sizes = {mode: kept(model, mode)[0] for mode in MODES}
    none, full = sizes["none"], sizes["full"]
    assert full < sizes["operators"] < none
    assert sizes["second"] == pytest.approx((none + full) / 2, rel=0.1)
    assert sizes["second-operators"] == pytest.approx((none + sizes["operators"]) / 2, rel=0.1)
    assert sizes["operators"] < 0.75 * none
    assert full < 0.25 * none
    assert sizes["offload"] == none  # there is no other memory than the host's


def test_what_is_kept_lies_on_the_host(make_model: Make, copies: None) -> None:
    """Of what blocks make, nothing is left but the output: copies on the host stand for it."""
    model = six_blocks(make_model)
    left, moved = [], []
    pack = torch.empty

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made = pack(*args, **kwargs)
        if "pin_memory" in kwargs:
            moved.append(made.numel() * made.element_size())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", noted)
        for mode in ("offload", "full-offload"):
            moved.clear()
            left.append((kept(model, mode)[0], sum(moved)))
    (offload, copied), (both, inputs) = left
    assert inputs == 6 * 4 * 32 * 32 * 4, "the inputs of six blocks, fp32"
    assert copied > 5 * inputs
    plain, _ = kept(model, "none")
    assert copied < 1.1 * plain, "a tensor that several operators save is copied once"
    assert offload - copied < 0.35 * plain, "little else than small tensors and weights stays"
    assert both < 0.3 * plain


@pytest.mark.parametrize(
    ("tokens", "precision"), [(20, "bf16"), (20, "fp32"), (64, "fp32"), (128, "fp32")], ids=str
)
def test_weights_do_not_go_to_the_host(
    tokens: int, precision: str, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the copies in bf16 that autocast makes of them; what is as wide as a weight is no weight."""
    block = make_model(hidden_size=64, intermediate_size=128).model.layers[0].mlp
    inputs, made, empty = torch.randn(2, tokens // 2, 64, requires_grad=True), [], torch.empty

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(args[0])
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    rounded = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with offloading(block, tokens, from_cpu=True), rounded:
        out = block(inputs)
    monkeypatch.undo()
    assert sorted(made) == [tokens * 64, *4 * [tokens * 128]], "the input, and what the gate takes and makes"
    out.float().sum().backward()
    assert inputs.grad is not None


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_training_is_the_same(mode: str, make_model: Make, tmp_path: Path, rows: Any) -> None:
    found = []
    for name in ("none", mode):
        fields = TrainingFields(steps=2, batch_size=4, checkpoint_every=0, precision="bf16", **MODES[name])
        model = make_model()
        Run(model, rows, fields=fields, scratch=tmp_path / name, device="cpu").train()
        found.append(LossLog(tmp_path / name / "losses.jsonl").losses())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert found[0] == found[1]


def test_every_nth_block_is_the_first_and_those_n_after() -> None:
    fields = TrainingFields(activation_checkpointing=True, checkpoint_blocks=3)
    assert [fields.recomputes(block) for block in range(7)] == [True, False, False, True, False, False, True]
    assert not TrainingFields().recomputes(0)
    assert all(TrainingFields(activation_checkpointing=True).recomputes(block) for block in range(3))


def test_the_forecast_follows_what_is_kept(make_model: Make) -> None:
    """Of a block and a token, between two depths, so that what lies outside the blocks cancels out."""
    found, width, inner = {}, 64, 192
    for mode in MODES:
        sizes, told = [], []
        for depth in (2, 6):
            settings = {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": inner}
            model = make_model(**settings, num_key_value_heads=4).train()
            sizes.append(kept(model, mode)[0])
            told.append(kept_per_token(TrainingFields(**MODES[mode]), depth, width, inner, "cpu"))
        found[mode] = (told[1] - told[0]) * 4 * 128 / (sizes[1] - sizes[0])
    assert found == {mode: pytest.approx(1, abs=0.1) for mode in MODES}
    on_gpu = {m: kept_per_token(TrainingFields(**MODES[m]), 6, width, inner, "cuda") for m in MODES}
    assert on_gpu["offload"] == on_gpu["full-offload"] < on_gpu["full"] < on_gpu["operators"] < on_gpu["none"]
