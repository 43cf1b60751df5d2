"""What a few blocks of tensors without memory tell, against what a real model with real tensors keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from compresskit.foresight.activations import Pass, Predicting, shortened, stretched, traced
from compresskit.training.fields import TrainingFields
from compresskit.training.objective import LOSS
from compresskit.training.redirect import redirected
from compresskit.training.surroundings import trainable

TOKENS, BLOCKS = 48, 5
HERE = Path(".")


def llama(blocks: int = BLOCKS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def gpt2(blocks: int = BLOCKS) -> GPT2Config:
    return GPT2Config(
        vocab_size=96,
        n_embd=64,
        n_layer=blocks,
        n_head=4,
        n_positions=128,
        architectures=["GPT2LMHeadModel"],
    )


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Address -> bytes of all that autograd keeps for the backward pass, but for the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def really_saved(config: Any, fields: TrainingFields, rows: int) -> int:
    """Bytes that one forward pass of the real model leaves for the backward pass."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().train()
    ids = torch.zeros(rows, TOKENS, dtype=torch.int64)
    # Two documents a row: a model that is given one alone makes no mask.
    positions = (torch.arange(TOKENS) % (TOKENS // 2)).expand(rows, -1)
    with trainable(model, fields), redirected(model, Predicting(), precision=fields.precision):
        with saved(model) as found:
            loss = model(input_ids=ids, position_ids=positions, labels=ids)[LOSS]
        assert loss.requires_grad
        return sum(found.values())


def predicted(config: Any, fields: TrainingFields, rows: int) -> Pass:
    two, four = (traced(config, HERE, fields, rows=rows, tokens=TOKENS, blocks=blocks) for blocks in (2, 4))
    return stretched(two, four, BLOCKS)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_what_is_kept_is_what_autograd_saves(config: Any, precision: str, rows: int) -> None:
    fields = TrainingFields(precision=precision)
    found = predicted(config, fields, rows)
    kept = found.begin.kept + BLOCKS * found.block.kept + found.head.kept
    assert kept == pytest.approx(really_saved(config, fields, rows), rel=0.03)


@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_recomputed_blocks_keep_their_inputs_alone(config: Any) -> None:
    fields = TrainingFields(activation_checkpointing=True)
    found = predicted(config, fields, 2)
    states = 4 * 2 * TOKENS * 64
    assert found.block.kept == pytest.approx(states, rel=0.01)
    plain = predicted(config, replace(fields, activation_checkpointing=False), 2)
    assert plain.block.kept > 5 * states
    # Going back a block makes all that it would have kept once more.
    assert found.block_back.peak > plain.block.kept


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_and_four_blocks_tell_of_seven(precision: str, recomputes: bool) -> None:
    fields = TrainingFields(precision=precision, activation_checkpointing=recomputes)
    two, four, seven = (
        traced(llama(7), HERE, fields, rows=2, tokens=TOKENS, blocks=blocks) for blocks in (2, 4, 7)
    )
    found = stretched(two, four, 7)
    for name in found.__dataclass_fields__:
        mine, true = getattr(found, name), getattr(seven, name)
        for part in ("kept", "gradient", "peak"):
            assert getattr(mine, part) == pytest.approx(getattr(true, part), rel=0.02, abs=600), name


def test_gradients_are_those_of_the_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    found = predicted(llama(), TrainingFields(), 1)
    assert found.block_back.gradient == 4 * block
    assert found.end.gradient == 4 * 96 * 64
    whole = found.head_back.gradient + BLOCKS * found.block_back.gradient + found.end.gradient
    assert whole == 4 * sum(p.numel() for p in model.parameters())


def test_a_shorter_model_has_the_first_blocks_and_leaves_the_other_as_it_was() -> None:
    config = LlamaConfig(num_hidden_layers=6, layer_types=["full_attention"] * 6)
    short = shortened(config, 2)
    assert short.num_hidden_layers == 2
    assert config.num_hidden_layers == 6
    assert shortened(gpt2(), 3).n_layer == 3
