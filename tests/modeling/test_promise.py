"""Shapes and ties: kept by a copy, seen when broken, the same after JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresskit.modeling import open_model
from compresskit.modeling.promise import Shape, Tied, standing_promises
from compresskit.stage import promise_from_json, promise_to_json
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_standing_promises_hold_and_survive_json(family: str, model: Model) -> None:
    source = open_model(model(family))
    promises = standing_promises(source.anatomy)
    assert sum(isinstance(p, Shape) for p in promises) == len(source.anatomy.parameter_shapes)
    for promise in promises:
        assert promise.broken(source, source) == ()
        assert promise_from_json(json.loads(json.dumps(promise_to_json(promise)))) == promise


def test_another_shape_and_a_missing_tensor_are_seen(model: Model) -> None:
    source = open_model(model("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert Shape(name, (8, 16)).broken(source, source) == ("shape (24, 16), was (8, 16)",)
    assert Shape("model.layers.9.mlp.up_proj.weight", (8, 16)).broken(source, source)


def test_an_untied_head_is_seen(model: Model, tmp_path: Path) -> None:
    made = open_model(model("llama-tied"))
    shutil.copytree(made.directory, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tied,) = (p for p in standing_promises(made.anatomy) if isinstance(p, Tied))
    assert tied.broken(made, open_model(tmp_path)) == (
        "lm_head.weight is no longer tied to model.embed_tokens.weight",
    )


def test_ties_of_plain_tensors_are_compared() -> None:
    class Plain(dict[str, torch.Tensor]):
        def tensor(self, name: str) -> torch.Tensor:
            return self[name]

    one = Plain(a=torch.ones(3), b=torch.ones(3))
    tied = Tied("a", ("a", "b"))
    assert tied.broken(one, one) == ()
    assert tied.broken(one, Plain(a=torch.ones(3), b=torch.zeros(3)))
    assert tied.broken(one, Plain(a=torch.ones(3))) == ("b is missing",)
