"""LoRA layers whose update is masked, against the dense computation they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from compresskit.training.adapters.frozen import frozen_linear
from compresskit.training.adapters.masked import mask_update, packed, unpacked

O, I, R, SCALING = 24, 40, 4, 2.0  # noqa: E741


def test_a_masked_update_is_that_of_the_dense_layer_with_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(O, I, generator=draw)
    weight_OI *= weight_OI.abs() > 0.6
    keep_OI, x = weight_OI != 0, torch.randn(6, I, generator=draw)
    bias_O = torch.randn(O, generator=draw)
    config = LoraConfig(r=R, lora_alpha=R * SCALING, target_modules=["layer"])
    parts = nn.ModuleDict({"other": nn.Linear(1, 1), "layer": frozen_linear(weight_OI, bias_O)})
    layer: Any = inject_adapter_in_model(config, parts)["layer"]
    mask_update(layer, keep_OI)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.randn(O, R, generator=draw) * 0.1)
    y = layer(x)
    y.square().sum().backward()
    a2, b2 = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    expected = F.linear(x, weight_OI + (b2 @ a2) * SCALING * keep_OI, bias_O)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, a2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad, b2.grad, rtol=1e-4, atol=1e-4)
    assert (layer.get_delta_weight("default")[~keep_OI] == 0).all()
    assert not layer.base_layer.weight.requires_grad
    assert "keep_bits" not in layer.state_dict(), "a mask follows from the zeros and is never saved"


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (33, 7)])
def test_a_mask_survives_packing(shape: tuple[int, int]) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert packed(keep).numel() == -(-keep.numel() // 8)
    assert torch.equal(unpacked(packed(keep), shape), keep)
