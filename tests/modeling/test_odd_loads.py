"""Packed checkpoints that other tools changed, or that are loaded where a layer cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compresskit as ck
from compresskit.errors import FormatError
from compresskit.formats.bitmask import Bitmask, layer_of
from tests.tiny import tiny_llama

UP, BIAS = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
Harm = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("odd")
    tiny_llama(place / "dense", attention_bias=True)
    tensors = load_file(place / "dense" / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            tensor *= torch.rand(tensor.shape) < 0.4
    save_file(tensors, place / "dense" / "model.safetensors", {"format": "pt"})
    ck.export(place / "dense", to="bitmask", out=place / "packed")
    return place / "packed"


def head_packed(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """A head that is packed, of a model whose config.json ties it to the embedding."""
    weight = tensors["model.embed_tokens.weight"] * (torch.arange(32) % 2)
    form = Bitmask({"lm_head": layer_of(weight)})
    tensors.update(form.encode([("lm_head.weight", weight)], {}))
    config["quantization_config"]["layers"] |= form.config({}, [])["layers"]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (head_packed, "lm_head: expected a weight of its own, got one that config.json ties to another"),
        (lambda t, c: t.pop(f"{BIAS}.bias"), f"{BIAS}: expected the bias that the model has, got none"),
        (lambda t, c: t.update({f"{UP}.scales": torch.ones(64, 1)}), f"{UP} scales: expected none"),
        (
            lambda t, c: c["quantization_config"]["layers"][UP].update(transposed=True),
            f"{UP}: expected transposed: False, as Linear stores it, got transposed: True",
        ),
    ],
)
def test_a_checkpoint_that_the_model_contradicts_is_refused(
    harm: Harm, told: str, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    tensors = load_file(packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    harm(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=told):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_layer_of_which_the_bias_alone_is_on_the_disk_is_refused(packed: Path, tmp_path: Path) -> None:
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    with pytest.raises(FormatError, match=rf"{BIAS}: expected a packed weight in memory, got one offloaded"):
        AutoModelForCausalLM.from_pretrained(packed, device_map=places, offload_folder=tmp_path)
