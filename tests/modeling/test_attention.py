"""Queries, keys and values as the attention of real models is given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compresskit.modeling import load_model
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.attention import attended_shapes, attending
from compresskit.modeling.skeleton import load_config, skeleton_of

IDS = torch.tensor([[2, 7, 9, 3], [2, 30, 8, 3]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_of_an_encoder_they_are_what_its_layers_make(tmp_path: Path, implementation: str) -> None:
    model: Any = load_model(tiny_bert(tmp_path / "m"))
    model.set_attn_implementation(implementation)
    block = model.encoder.layer[1]
    seen: dict[str, torch.Tensor] = {}
    layers = {name: getattr(block.attention.self, name) for name in ("query", "key", "value")}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        with attending([block]) as kept:
            watched = model(input_ids=IDS)[0]
        again = model(input_ids=IDS)[0]
    assert list(kept) == [block]
    for found, name in zip(kept[block], layers, strict=True):
        assert found.shape == (2, 4, 4, 8)
        assert torch.equal(found.flatten(2), seen[name])
    assert torch.equal(watched, again)
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_of_a_language_model_they_are_turned_and_there_are_fewer_keys(tmp_path: Path) -> None:
    model: Any = load_model(tiny_llama(tmp_path / "m", vocab_size=64, bos_token_id=1, eos_token_id=2))
    block, attention = model.model.layers[0], model.model.layers[0].self_attn
    with torch.no_grad(), attending(model.model.layers) as kept:
        model(input_ids=IDS)
        embedded = block.input_layernorm(model.model.embed_tokens(IDS))
        turned = model.model.rotary_emb(embedded, torch.arange(4)[None])
        q, k, v = (
            layer(embedded).unflatten(-1, (-1, 8)).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
    assert len(kept) == 2
    q, k = apply_rotary_pos_emb(q, k, *turned)
    for found, true in zip(kept[block], (q, k, v), strict=True):
        torch.testing.assert_close(found, true.transpose(1, 2))


def test_one_layer_may_make_all_three() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad(), attending(model.transformer.h) as kept:
        model(input_ids=IDS)
    assert [t.shape for t in kept[model.transformer.h[1]]] == [(2, 4, 4, 8)] * 3


def test_gradients_flow_through_what_is_kept(tmp_path: Path) -> None:
    model: Any = load_model(tiny_bert(tmp_path / "m"))
    with attending([model.encoder.layer[1]]) as kept:
        model(input_ids=IDS)
    kept[model.encoder.layer[1]].keys.square().sum().backward()
    assert model.encoder.layer[1].attention.self.key.weight.grad.any()
    assert model.encoder.layer[0].output.dense.weight.grad.any()
    assert model.encoder.layer[1].attention.self.query.weight.grad is None


def test_shapes_are_told_without_weights(tmp_path: Path) -> None:
    place = tiny_llama(tmp_path / "m")
    model = skeleton_of(load_config(place), place)
    assert attended_shapes(model, anatomy_of(model).blocks) == {
        f"model.layers.{i}": ((1, 1, 4, 8), (1, 1, 2, 8), (1, 1, 2, 8)) for i in range(2)
    }
    assert attended_shapes(model, ["model.norm"]) == {}
