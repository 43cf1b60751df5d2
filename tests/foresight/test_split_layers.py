"""What a rank has of split layers, foretold twice: from shapes, and of a model that is cut for a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import compresskit as ck
from compresskit.foresight.devices import machine
from compresskit.foresight.split import exchanged_bytes, local_shapes, split
from compresskit.modeling.anatomy import anatomy_of

WIDTH, INNER, VOCABULARY = 64, 176, 97


def config(vocabulary: int = VOCABULARY, *, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_model_that_is_cut(tied: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(tied=tied))
    anatomy = anatomy_of(model)
    whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = local_shapes(model.config, anatomy, whole, 2)
    split(model, 2)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == found
    assert found["model.embed_tokens.weight"] == (49, WIDTH)  # the fuller of two ranks
    assert found["model.layers.0.mlp.gate_proj.weight"] == (INNER // 2, WIDTH)
    assert found["model.layers.0.mlp.down_proj.weight"] == (WIDTH, INNER // 2)
    assert found["model.layers.0.self_attn.k_proj.bias"] == (WIDTH // 4,)
    assert found["model.layers.0.self_attn.o_proj.bias"] == (WIDTH,)
    assert local_shapes(model.config, anatomy, whole, 1) == whole


def test_ranks_add_up_what_layers_make_and_are_given() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    anatomy = anatomy_of(model)
    # A block: gradients of the inputs of five layers in fp32, and what two layers make, in bf16.
    block = 5 * WIDTH * 4 + 2 * WIDTH * 2
    assert exchanged_bytes(model.config, anatomy, 2, 0.0) == 4 * WIDTH + 3 * block
    again = exchanged_bytes(model.config, anatomy, 2, 1.0)
    assert again - exchanged_bytes(model.config, anatomy, 2, 0.0) == 3 * 2 * WIDTH * 2


def test_half_of_what_blocks_keep_and_the_head_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.foresight.forecast.candidates", lambda *_: [])  # the trace alone
    (tmp_path / "config.json").write_text(config(4096).to_json_string())
    stage = ck.Finetune(batch_size=2, context_length=64)
    recipe = ck.Recipe(model=str(tmp_path / "config.json"), stages=(stage,))
    (one,) = ck.foresee(recipe, machine(gpus=2, gpu="l4")).forecasts
    stages = [replace(one.subject.stage, strategy="tp", tensor_parallel=ways) for ways in (1, 2)]
    plain, halved = (one.subject.passed(stage, 2) for stage in stages)
    states = 4 * 2 * 64 * WIDTH
    # Inputs of layers stay whole; what layers make is halved.
    assert halved.block.kept < 0.75 * plain.block.kept
    assert halved.block.kept > plain.block.kept / 2 + states
    assert halved.head.peak == pytest.approx(plain.head.peak + 4 * 4096 * WIDTH, rel=0.1)
    assert halved.block_back.gradient == pytest.approx(plain.block_back.gradient / 2, rel=0.05)
