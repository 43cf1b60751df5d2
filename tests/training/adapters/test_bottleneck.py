"""Bottleneck adapters: nothing at first, the formula after, and a directory that only says what it is."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import Train
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from compresskit.modeling import ModelSource, load_model
from compresskit.training.adapters.attach import parts_of
from compresskit.training.adapters.bottleneck import BottleneckConfig

# peft asks transformers by an old name; compresskit.training.adapters.attach says the same.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def test_parts_are_the_children_of_blocks_that_hold_linear_layers(dense: ModelSource) -> None:
    found = parts_of(dense.anatomy)
    assert found == tuple(f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp"))


def test_a_part_gets_its_bottleneck_behind_it(dense: ModelSource) -> None:
    ids = torch.arange(9)[None]
    before = load_model(dense)(input_ids=ids).logits
    config = BottleneckConfig(task_type="CAUSAL_LM", r=3, width=32, target_modules=["model.layers.1.mlp"])
    model = get_peft_model(load_model(dense), config).eval()
    assert torch.equal(model(input_ids=ids).logits, before)
    layer = model.get_base_model().model.layers[1].mlp
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    torch.nn.init.normal_(up.weight)
    x = torch.randn(1, 4, 32)
    plain = layer.base_layer(x)
    torch.testing.assert_close(layer(x), plain + F.relu(plain @ down.weight.T + down.bias) @ up.weight.T)


def test_peft_loads_what_was_trained(dense: ModelSource, train: Train) -> None:
    done = train(dense, adapter="bottleneck", base="none", finish="adapter")
    assert json.loads((done.out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    ids = torch.arange(9)[None]
    tuned = PeftModel.from_pretrained(load_model(dense), done.out / "adapter").eval()
    torch.testing.assert_close(tuned(input_ids=ids).logits, done.model.eval()(input_ids=ids).logits)
