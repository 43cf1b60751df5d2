"""What is found in each family, against what is known of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compresskit.modeling import context_length, load_model, open_model, skeleton
from compresskit.modeling.anatomy import anatomy_of
from tests.modeling.conftest import Model
from tests.modeling.families import CAUSAL, FAMILIES

LLAMA = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
# family: blocks, linear layers of a block, linear layers outside, number of tied groups, embedding
KNOWN = {
    "llama": ("model.layers", LLAMA, ["lm_head"], 0, "model.embed_tokens"),
    "llama-tied": ("model.layers", LLAMA, ["lm_head"], 1, "model.embed_tokens"),
    "qwen2": ("model.layers", LLAMA, ["lm_head"], 0, "model.embed_tokens"),
    "qwen3": ("model.layers", LLAMA, ["lm_head"], 1, "model.embed_tokens"),
    "mistral": ("model.layers", LLAMA, ["lm_head"], 0, "model.embed_tokens"),
    "gemma2": ("model.layers", LLAMA, ["lm_head"], 1, "model.embed_tokens"),
    "gemma3": ("model.layers", LLAMA, ["lm_head"], 1, "model.embed_tokens"),
    "gpt2": (
        "transformer.h",
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ["lm_head"],
        1,
        "transformer.wte",
    ),
    "opt": (
        "model.decoder.layers",
        [f"self_attn.{p}" for p in ("k_proj", "v_proj", "q_proj", "out_proj")] + ["fc1", "fc2"],
        ["lm_head", "model.decoder.project_in", "model.decoder.project_out"],
        1,
        "model.decoder.embed_tokens",
    ),
    "bert": (
        "bert.encoder.layer",
        [f"attention.self.{p}" for p in ("query", "key", "value")]
        + ["attention.output.dense", "intermediate.dense", "output.dense"],
        ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        2,
        "bert.embeddings.word_embeddings",
    ),
}
KNOWN["gpt2-bare"] = KNOWN["gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_layers_and_ties_are_found(family: str, model: Model) -> None:
    stem, inside, outside, groups, embeddings = KNOWN[family]
    source = open_model(model(family))
    anatomy = source.anatomy
    assert anatomy.blocks == tuple(f"{stem}.{i}" for i in range(3))
    for block in anatomy.blocks:
        here = [n for n, linear in anatomy.linears.items() if linear.block == block]
        assert sorted(here) == sorted(f"{block}.{name}" for name in inside)
    assert sorted(n for n, linear in anatomy.linears.items() if not linear.block) == sorted(outside)
    assert len(anatomy.tied) == groups
    assert anatomy.embeddings == embeddings
    assert anatomy.is_causal is (family in CAUSAL)
    assert anatomy.head == ("cls.predictions.decoder" if family == "bert" else "lm_head")
    assert anatomy.linears[anatomy.head].tied is bool(groups)
    assert context_length(source.config) == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_loaded_model(family: str, model: Model) -> None:
    source = open_model(model(family))
    whole = load_model(source)
    assert source.anatomy.num_parameters == sum(p.numel() for p in whole.parameters())
    shapes = {n: tuple(p.shape) for n, p in whole.named_parameters(remove_duplicate=False)}
    assert dict(source.anatomy.parameter_shapes) == shapes
    for name, linear in source.anatomy.linears.items():
        module = whole.get_submodule(name)
        x = torch.zeros(1, linear.in_features)
        assert module(x).shape == (1, linear.out_features)
        assert linear.has_bias is (module.bias is not None)


def test_lists_within_and_beside_the_blocks_are_not_the_blocks() -> None:
    def block() -> nn.Module:
        part = nn.Module()
        part.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        part.out = nn.Linear(4, 4)
        return part

    whole = nn.Module()
    whole.stem = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    whole.layers = nn.ModuleList(block() for _ in range(2))
    whole.adapters = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    anatomy = anatomy_of(whole)
    assert anatomy.blocks == ("layers.0", "layers.1")
    assert anatomy.linears["layers.1.experts.2"].block == "layers.1"
    assert anatomy.linears["adapters.1"].block is None
    assert anatomy.head is None
    assert anatomy_of(nn.Linear(2, 2)).blocks == ()


def test_the_skeleton_takes_no_memory_and_leaves_the_config_alone(model: Model) -> None:
    source = open_model(model("gemma3"))
    before = source.config.to_dict()
    empty = skeleton(source, dtype=torch.bfloat16)
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert empty.dtype == torch.bfloat16
    assert not empty.training
    assert source.config.to_dict() == before


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_real_models_open(name: str, shared_data: Path) -> None:
    source = open_model(shared_data / "models" / name)
    whole = AutoModelForCausalLM.from_pretrained(source.directory)
    assert source.anatomy.num_parameters == whole.num_parameters()
    assert source.warnings == ()
    for parameter, tensor in whole.named_parameters(remove_duplicate=False):
        assert torch.equal(source.tensor(parameter), tensor)


def test_a_layer_that_computes_otherwise_is_not_plain() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Named(nn.Linear):
        pass

    linears = anatomy_of(nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), Named(4, 4))).linears
    assert [linear.is_plain for linear in linears.values()] == [True, False, True]
