"""Which models can be split among ranks is told from their configurations and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from compresskit.modeling.anatomy import anatomy_of
from compresskit.training.mesh.plan import ELSE, styles, tensor_faults

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def skeleton(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = AutoModelForCausalLM.from_config(config)
    return made


def faults(config: PretrainedConfig, ways: int) -> list[str]:
    found = tensor_faults(config, anatomy_of(skeleton(config)), ways, "stages[0]")
    assert {fault.where for fault in found} <= {"stages[0].tensor_parallel"}
    assert all(ELSE in fault.cure for fault in found)
    return [f"{fault.expected} / {fault.got}" for fault in found]


def test_layers_are_found_by_their_names_in_the_base_model() -> None:
    config = LlamaConfig(**SIZES)
    model = skeleton(config)
    found = styles(config, dict(model.named_modules()))
    assert len(found) == 12 * 7
    assert found["model.layers.11.self_attn.q_proj"] == "colwise"
    assert found["model.layers.0.mlp.down_proj"] == "rowwise"
    assert "lm_head" not in found
    inner = styles(config, dict(model.base_model.named_modules()))  # type: ignore[operator]
    assert len(inner) == len(found)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, Phi3Config, Olmo2Config])
def test_what_can_be_split_has_no_faults(kind: type[PretrainedConfig]) -> None:
    assert faults(kind(**SIZES), 2) == []


def test_an_embedding_that_could_be_split_stays_whole() -> None:
    """As the plans of some versions of transformers would have it, which split all else alike."""
    config = LlamaConfig(**SIZES)
    config.base_model_tp_plan = dict(config.base_model_tp_plan or {}) | {"embed_tokens": "embedding_rowwise"}
    assert faults(config, 2) == []
    found = styles(config, dict(skeleton(config).named_modules()))
    assert "model.embed_tokens" not in found
    assert len(found) == 12 * 7


def test_everything_that_does_not_divide_is_told() -> None:
    sizes = SIZES | {"intermediate_size": 18, "num_key_value_heads": 1, "head_dim": 6}
    assert faults(LlamaConfig(**sizes), 4) == [
        "a divisor of num_key_value_heads=1 / 4",
        "a divisor of out_features=6 of model.layers.0.self_attn.k_proj / 4",
        "a divisor of out_features=18 of model.layers.0.mlp.gate_proj / 4",
        "a divisor of in_features=18 of model.layers.0.mlp.down_proj / 4",
    ]


def test_heads_may_be_uneven_where_they_are_gathered() -> None:
    assert not any("heads" in told for told in faults(Olmo2Config(**SIZES), 4))


def test_a_model_without_a_plan_is_told() -> None:
    (told,) = faults(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32), 2)
    assert told == "a model for which transformers has a plan of how layers are split / GPT2Config"


def test_a_layer_split_in_another_way_is_told() -> None:
    config = Qwen3MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    told = faults(config, 2)
    assert told
    assert all(line.startswith("layers split as colwise, ") for line in told)
    assert any("experts" in line for line in told)
