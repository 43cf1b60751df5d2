"""Layers that hold zeros and grids, against the dense computation they stand for; gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse
from compresskit.training.adapters.bits import freeze, frozen_weight
from compresskit.training.adapters.held import hold
from compresskit.training.adapters.merge import merged, update
from compresskit.training.adapters.on_grid import GridLinear

O, I, R, SCALING = 24, 40, 4, 2.0  # noqa: E741


def lora(base: nn.Linear, *, dora: bool = False, dropout: float = 0.0) -> Any:
    config = LoraConfig(
        r=R, lora_alpha=R * SCALING, lora_dropout=dropout, target_modules=["layer"], use_dora=dora
    )
    layer = inject_adapter_in_model(config, nn.ModuleDict({"other": nn.Linear(1, 1), "layer": base}))["layer"]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(torch.randn(O, R, generator=generator) * 0.1)
    return layer


@pytest.fixture
def weight_OI() -> Tensor:
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(0))
    return weight * (weight.abs() > 0.6)


def check(layer: Any, whole: Any, x: Tensor) -> None:
    """``layer(x)`` and its gradients are those of ``x @ whole(a, b).T``."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = layer(x)
    y.square().sum().backward()
    a2, b2 = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    expected = F.linear(x, whole(a2, b2))
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, a2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad, b2.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_a_masked_layer_computes_the_masked_weight(weight_OI: Tensor, base: str) -> None:
    keep_OI = weight_OI != 0
    layer = lora(freeze(weight_OI, None, base, dtype=torch.float32))
    frozen_OI = frozen_weight(layer.base_layer)
    hold(layer, keep_OI=keep_OI)
    x = torch.randn(6, I, generator=torch.Generator().manual_seed(1))
    check(layer, lambda a, b: frozen_OI + (b @ a) * SCALING * keep_OI, x)
    assert (layer.get_delta_weight("default")[~keep_OI] == 0).all()


def test_a_masked_dora_layer_gives_each_row_its_magnitude(weight_OI: Tensor) -> None:
    keep_OI = weight_OI != 0
    layer = lora(freeze(weight_OI, None, "none", dtype=torch.float32), dora=True)
    hold(layer, keep_OI=keep_OI)
    magnitude_O = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude_O.mul_(1.5)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole_OI = merged(weight_OI, a, b, SCALING, keep_OI=keep_OI, magnitude_O=magnitude_O)
    x = torch.randn(6, I)
    torch.testing.assert_close(layer(x), x @ whole_OI.T)
    torch.testing.assert_close(whole_OI.norm(dim=1), magnitude_O.detach())
    assert (whole_OI[~keep_OI] == 0).all()


def test_dora_that_is_not_held_is_peft_own(weight_OI: Tensor) -> None:
    layer = lora(freeze(weight_OI, None, "none", dtype=torch.float32), dora=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude_O = layer.lora_magnitude_vector["default"].weight
    whole_OI = merged(weight_OI, a, b, SCALING, magnitude_O=magnitude_O)
    x = torch.randn(6, I)
    torch.testing.assert_close(layer(x), x @ whole_OI.T)


def test_a_layer_on_a_grid_computes_the_rounded_weight_and_passes_the_gradient(weight_OI: Tensor) -> None:
    grid = grid_for(weight_OI, parse("w4a16-g8"))
    keep_OI = weight_OI != 0
    layer = lora(GridLinear(grid.snap(weight_OI), None, grid))
    hold(layer, keep_OI=keep_OI, grid=grid)

    def whole(a: Tensor, b: Tensor) -> Tensor:
        new_OI = grid.snap(weight_OI) + update(a, b, SCALING, keep_OI)
        return new_OI + (grid.snap(new_OI.detach()) - new_OI).detach()

    check(layer, whole, torch.randn(6, I, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_in_a_held_layer_is_peft_own(weight_OI: Tensor, dora: bool) -> None:
    """All weights may move, so that peft's own layer is the oracle; the same inputs are dropped in both."""
    x = torch.randn(50, I, generator=torch.Generator().manual_seed(1))
    found = []
    for held in (False, True):
        layer = lora(freeze(weight_OI, None, "none", dtype=torch.float32), dora=dora, dropout=0.5).train()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.linspace(-1, 1, R * I).reshape(R, I))
        if held:
            hold(layer, keep_OI=torch.ones(O, I, dtype=torch.bool))
        torch.manual_seed(0)
        found.append(layer(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["zeros", "grid", "dora"])
def test_dropout_leaves_the_input_of_the_frozen_weight_alone(weight_OI: Tensor, kind: str) -> None:
    grid = grid_for(weight_OI, parse("w4a16-g8")) if kind == "grid" else None
    plain = GridLinear(grid.snap(weight_OI), None, grid) if grid else nn.Linear(I, O, bias=False)
    layer = lora(plain, dora=kind == "dora", dropout=0.5).train()
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    hold(layer, keep_OI=weight_OI != 0, grid=grid)
    x = torch.randn(6, I)
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1.0)
    drawn = [layer(x) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(layer.eval()(x), layer(x))


def test_a_row_of_zeros_stays_zero_in_dora_and_no_gradient_is_nan(weight_OI: Tensor) -> None:
    weight_OI[3] = 0
    keep_OI = weight_OI != 0
    layer = lora(freeze(weight_OI, None, "none", dtype=torch.float32), dora=True)
    hold(layer, keep_OI=keep_OI)
    x = torch.randn(6, I)
    y = layer(x)
    y.square().sum().backward()
    assert (y[:, 3] == 0).all()
    assert y.isfinite().all()
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    magnitude_O = layer.lora_magnitude_vector["default"].weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole_OI = merged(weight_OI, a, b, SCALING, keep_OI=keep_OI, magnitude_O=magnitude_O)
    assert (whole_OI[3] == 0).all()
    assert whole_OI.isfinite().all()
