"""Stages of a model one after another, in one process: what they make is what the whole model makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from compresskit.errors import PlanError
from compresskit.training.driver.stage import (
    Stage,
    StandIn,
    keep_only,
    layout_of,
    owners,
    require_stages_compose,
    shared_by_ends,
)

STAGES = (range(1), range(1, 3), range(3, 4))
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WIDE: dict[str, Any] = {**SIZES, "intermediate_size": 32}
HEADS: dict[str, Any] = {**WIDE, "num_key_value_heads": 2, "head_dim": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**HEADS),
    "qwen3": Qwen3Config(**HEADS),
    "gemma2": Gemma2Config(**HEADS, sliding_window=3),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=16, n_layer=4, n_head=4, n_positions=32, tie_word_embeddings=True
    ),
    "neox": GPTNeoXConfig(**WIDE),
    "opt": OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[name]).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat((torch.arange(4), torch.arange(5))).repeat(2, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_make_what_the_model_makes_and_all_gradients(name: str) -> None:
    model = model_of(name).eval()
    layout = layout_of(model)
    require_stages_compose(model, layout, STAGES)
    ids, positions = packed()
    whole = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    whole.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [Stage(model, layout, i, STAGES, "fp32").eval() for i in range(3)]
    states = ids
    for part in parts:
        states = part.states(states, positions)
    torch.testing.assert_close(states, whole)
    states.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n in found:
        torch.testing.assert_close(found[n], expected[n], msg=n)


def test_a_stage_keeps_its_own_and_stands_in_for_the_rest() -> None:
    model = model_of("llama")
    layout = layout_of(model)
    whole = sum(p.numel() for p in model.parameters())
    names = owners(model, layout, STAGES)
    assert names["model.embed_tokens.weight"] == 0
    assert names["model.layers.2.mlp.up_proj.weight"] == 1
    assert names["model.norm.weight"] == names["lm_head.weight"] == 2
    kept = []
    for index, own in enumerate(STAGES):
        part = model_of("llama")
        keep_only(part, layout, own, is_first=index == 0, is_last=index == 2)
        assert {n for n, _ in part.named_parameters()} == {n for n, at in names.items() if at == index}
        kept.append(sum(p.numel() for p in part.parameters()))
    assert sum(kept) == whole


def test_tied_ends_are_found_and_other_ties_are_refused() -> None:
    model = model_of("gpt2")
    names = owners(model, layout_of(model), STAGES)
    (tied,) = shared_by_ends(model, names, 2)
    assert tied is model.get_output_embeddings().weight
    llama = model_of("llama")
    names = owners(llama, layout_of(llama), STAGES)
    assert shared_by_ends(llama, names, 2) == []
    llama.model.layers[1].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    with pytest.raises(PlanError, match="share no weights"):
        shared_by_ends(llama, names, 2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_whose_blocks_see_the_embeddings_is_refused(fails: bool) -> None:
    """Here by their rotation, which every stage makes anew of what it is given."""
    model = model_of("llama")
    plain, embedded = model.model.rotary_emb.forward, model.model.embed_tokens(torch.arange(1, 13)[None])

    def forward(states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if fails and not torch.equal(states, embedded):
            raise ValueError("no embeddings")
        return tuple(part * states.norm() for part in plain(states, position_ids))

    model.model.rotary_emb.forward = forward
    layout = layout_of(model)
    with pytest.raises(PlanError, match="no embeddings" if fails else "nothing but the states"):
        require_stages_compose(model, layout, STAGES)


def test_a_stand_in_gives_on_what_it_was_given() -> None:
    block = nn.Linear(2, 2)
    stand_in = StandIn(block, in_tuple=True)
    assert stand_in.in_features == 2
    hidden = torch.ones(1, 2)
    assert stand_in(hidden_states=hidden)[0] is hidden
    stand_in.given = torch.zeros(1, 2)
    assert stand_in(hidden)[0] is stand_in.given
    assert stand_in.seen is hidden
