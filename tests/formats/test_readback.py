"""A packed checkpoint that differs in one bit, or lacks a parameter, is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compresskit as ck
from compresskit.errors import FormatError
from compresskit.formats.readback import read_back
from compresskit.modeling import open_model
from tests.tiny import tiny_llama

LAYER = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["w8a8", "w4a16-g32"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    (place / "text.txt").write_text("Not read by this method.")
    recipe = ck.Recipe(
        model=str(tiny_llama(place / "model", dtype=torch.bfloat16)),
        data=str(place / "text.txt"),
        stages=(ck.Quantize("rtn", scheme=request.param),),
    )
    ck.run(recipe, place / "out", keep_stages=True, measures=())
    return place / "out"


def test_every_parameter_comes_back(packed: Path) -> None:
    model = open_model(packed / "stages" / "1-quantize")
    assert read_back(model, packed) == len(model.names())


def flip(tensors: Tensors) -> None:
    key = next(k for k in tensors if k.startswith(LAYER) and tensors[k].dtype in (torch.int8, torch.int32))
    tensors[key][3, 1] ^= 1


def rescale(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_scale"][0, 0] *= 1.01


def nudge(tensors: Tensors) -> None:
    tensors["model.norm.weight"][5] += 0.01


def lose(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize("harm", [flip, rescale, nudge, lose])
def test_harm_is_found(harm: Callable[[Tensors], None], packed: Path, tmp_path: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    harm(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    name = "model.norm.weight" if harm in (nudge, lose) else f"{LAYER}.weight"
    with pytest.raises(FormatError, match=f"(1 that differ and 0|0 that differ and 1) missing: {name}"):
        read_back(open_model(packed / "stages" / "1-quantize"), tmp_path)
