"""Documents packed into one row: which models keep them apart, found out by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.training import isolation
from compresskit.training.isolation import model_sees_across, probed_faults

SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
SMALL_GPT = {"vocab_size": 258, "n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "LlamaForCausalLM": ("LlamaConfig", SIZES | {"intermediate_size": 64}, False),
    "Qwen3ForCausalLM": ("Qwen3Config", GATED, False),
    "MistralForCausalLM": ("MistralConfig", GATED, False),
    "Gemma2ForCausalLM": ("Gemma2Config", GATED, False),
    "MixtralForCausalLM": ("MixtralConfig", GATED, False),
    "GPT2LMHeadModel": ("GPT2Config", SMALL_GPT, False),
    "OPTForCausalLM": ("OPTConfig", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "BloomForCausalLM": (
        "BloomConfig",
        {"vocab_size": 258, "hidden_size": 32, "n_layer": 4, "n_head": 4},
        True,
    ),
}


def config_of(architecture: str) -> Any:
    name, sizes, _ = CASES[architecture]
    config = getattr(transformers, name)(**sizes)
    config.architectures = [architecture]
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", CASES)
def test_a_probe_and_the_model_itself_agree(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, sees = config_of(architecture), CASES[architecture][2]
    before = config.to_dict()
    anatomy = anatomy_of(skeleton_of(config, tmp_path))
    faults = probed_faults("s", config, anatomy, tmp_path, trust_remote_code=False)
    assert bool(faults) == sees
    assert config.to_dict() == before
    torch.manual_seed(0)
    wide = "init_std" if hasattr(config, "init_std") else "initializer_range"
    setattr(config, wide, 0.2)  # as in a trained model, attention must matter more than rounding
    model = getattr(transformers, architecture)(config).to(dtype).train()
    assert model_sees_across(model) == sees
    assert model.training


def test_a_block_too_large_is_left_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("OPTForCausalLM")
    anatomy = anatomy_of(skeleton_of(config, tmp_path))
    monkeypatch.setattr(isolation, "PROBE_PARAMETERS", 1000)
    assert probed_faults("s", config, anatomy, tmp_path, trust_remote_code=False) == []
