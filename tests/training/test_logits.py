"""Which models' logits are the projection of their last hidden states, found out by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.training.isolation import probed_faults
from compresskit.training.logits import projects_otherwise
from compresskit.training.objective import softcap_in

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("Llama", GATED, False),
    "tied": ("Llama", GATED | {"tie_word_embeddings": True}, False),
    "softcap": ("Gemma2", GATED | {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
    "dropout": ("GPT2", GPT | {"resid_pdrop": 0.5, "embd_pdrop": 0.5}, False),
    "divided": ("Granite", GATED | {"logits_scaling": 8.0}, True),
    "multiplied": ("Cohere", GATED | {"logit_scale": 0.0625}, True),
    "another softcap": ("RecurrentGemma", GATED | {"lru_width": 32, "logits_soft_cap": 30.0}, True),
    "transformed before": ("Bert", SIZES | {"intermediate_size": 64, "is_decoder": True}, True),
}


def config_of(name: str) -> Any:
    family, sizes, _ = CASES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, None)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


@pytest.mark.parametrize("name", CASES)
def test_a_random_model_tells(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name)).train()
    assert projects_otherwise(model) == CASES[name][2]
    assert model.training


@pytest.mark.parametrize(("name", "found"), [("plain", 0), ("another softcap", 1), ("divided", 0)])
def test_a_plan_is_told_of_what_no_field_is_known_for(name: str, found: int, tmp_path: Path) -> None:
    """That logits are divided is told of the field itself."""
    config = config_of(name)
    anatomy = anatomy_of(skeleton_of(config, tmp_path))
    faults = probed_faults("s", config, anatomy, tmp_path, trust_remote_code=False, isolated=False)
    expected = "a model whose logits are its output projection of its last hidden states"
    assert [(fault.where, fault.expected) for fault in faults] == found * [("s", expected)]


def test_the_softcap_of_a_model_of_text_and_more_is_that_of_its_text() -> None:
    config = transformers.Gemma3Config(text_config={"final_logit_softcapping": 30.0})
    assert softcap_in(config) == softcap_in(config.text_config) == 30
    assert softcap_in(transformers.LlamaConfig()) == softcap_in(None) == 0
