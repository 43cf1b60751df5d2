"""Products in fp8, rounded as on a GPU and multiplied in a wider type: near bf16, zeros held, all undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from compresskit.errors import EngineError, PlanError
from compresskit.training import surroundings
from compresskit.training.fields import TrainingFields
from compresskit.training.fp8 import fp8_products, multiplies_fp8
from compresskit.training.rules import precision
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
pytest.importorskip("torchao")


def rounded(tensor: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Scaled by its largest number, rounded to ``kind`` and back."""
    scale = torch.finfo(kind).max / tensor.abs().max().double()
    return ((tensor.double() * scale).float().to(kind).double() / scale).float()


def test_each_product_is_of_rounded_factors(make_model: Make) -> None:
    model = make_model(hidden_size=64, intermediate_size=128).train()
    layer, inputs = model.model.layers[0].mlp.up_proj, torch.randn(2, 24, 64, requires_grad=True)
    given, before = torch.randn(2, 24, 128), set(vars(layer))
    with fp8_products(model, emulate=True):
        out = layer(inputs)
        out.backward(given)
        wide = layer.eval()(inputs)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x, w, g = rounded(inputs.detach(), e4m3), rounded(layer.weight.detach(), e4m3), rounded(given, e5m2)
    torch.testing.assert_close(out, x @ w.T, rtol=1e-3, atol=1e-3)
    assert inputs.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(inputs.grad, g @ w, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.weight.grad, g.flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-3, atol=2e-3)
    assert torch.equal(wide, nn.functional.linear(inputs, layer.weight))
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == before


def test_training_stays_near_and_holds_zeros(
    make_model: Make, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "fp8_products", partial(fp8_products, emulate=True))
    monkeypatch.setattr(precision, "multiplies_fp8", lambda device: True)
    losses = {}
    for kind in ("bf16", "fp8"):
        model = make_model()
        layer = model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            layer.weight[:, ::2] = 0
        fields = TrainingFields(steps=6, batch_size=4, checkpoint_every=0, precision=kind, learning_rate=5e-3)
        held = ("model.layers.1.mlp.down_proj",)
        Run(model, rows, fields=fields, scratch=tmp_path / kind, held=held, device="cpu").train()
        losses[kind] = LossLog(tmp_path / kind / "losses.jsonl").losses()
        assert not layer.weight[:, ::2].any()
        assert type(layer) is nn.Linear
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
    assert losses["fp8"][-1] < losses["fp8"][0]


def test_a_cpu_is_refused(make_model: Make, rows: Any, tmp_path: Path) -> None:
    assert not multiplies_fp8("cpu")
    with pytest.raises(PlanError, match=r"compute capability 8\.9 or higher"):
        Run(
            make_model(), rows, fields=TrainingFields(precision="fp8"), scratch=tmp_path, device="cpu"
        ).train()


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_which_gpus_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert multiplies_fp8("cuda") is expected


def test_widths_that_are_no_multiples_of_16(make_model: Make) -> None:
    model = make_model(hidden_size=24, intermediate_size=40)
    with pytest.raises(EngineError, match="multiples of 16"), fp8_products(model):
        pass
