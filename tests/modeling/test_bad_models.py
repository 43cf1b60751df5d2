"""Everything a user can hand in that is no model, or a damaged one: the error names it and its cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresskit.errors import Fault, InputError, ModelError
from compresskit.modeling import load_model, load_tokenizer, open_model
from compresskit.modeling.skeleton import resolve_device, resolve_dtype
from tests.modeling.conftest import Model

UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"
Damage = Callable[[Path], Any]


def edit_config(**changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(directory: Path) -> None:
        state = load_file(directory / WEIGHTS)
        change(state)
        save_file(state, directory / WEIGHTS)

    return damage


def truncate(size: int) -> Damage:
    def damage(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(content[:size])

    return damage


def pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def only(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / name).write_text("{}")

    return damage


def shards(change: Callable[[Path, dict[str, str]], Any]) -> Damage:
    """Split the weights in two with an index, then ``change`` them."""

    def damage(directory: Path) -> None:
        state = load_file(directory / WEIGHTS)
        names = sorted(state)
        files = {n: f"model-0000{1 + (n >= names[9])}-of-00002.safetensors" for n in names}
        for file in set(files.values()):
            save_file({n: state[n] for n in names if files[n] == file}, directory / file)
        (directory / WEIGHTS).unlink()
        change(directory, files)
        if not (directory / "model.safetensors.index.json").exists():
            text = json.dumps({"weight_map": files})
            (directory / "model.safetensors.index.json").write_text(text)

    return damage


BAD: dict[str, tuple[Damage, str, str]] = {
    # what was done: (how, what the message names, what it says to do)
    "no config": (lambda d: (d / "config.json").unlink(), "config.json", "Give the directory of a Hugging"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json", "Mend the file"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json", "Mend the file"),
    "no architecture": (edit_config(architectures=None), "architectures", 'Add "architectures": ["LlamaFor'),
    "wrong architecture": (
        edit_config(architectures=["LamaForCausalLM"]),
        "LamaForCausalLM",
        "mean: LlamaFor",
    ),
    "unknown type": (edit_config(model_type="lama"), "config.json", "Mend the file"),
    "code of its own": (
        edit_config(architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "mine.MyModel"}),
        "MyModel",
        "set trust_remote_code",
    ),
    "impossible sizes": (edit_config(hidden_size="wide"), "config.json", "Mend the file"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "no weights", "give the path of its config.json"),
    "pickle only": (pickle_only, "pytorch_model.bin", "save_pretrained"),
    "gguf only": (only("model.gguf"), "model.gguf", "save_pretrained"),
    "adapter only": (only("adapter_config.json"), "adapter", "merge_and_unload"),
    "shards without index": (
        only("model-00001-of-00002.safetensors"),
        "without an index",
        "Fetch model.safe",
    ),
    "empty weights": (truncate(0), WEIGHTS, "Download or copy"),
    "truncated in the header": (truncate(100), WEIGHTS, "Download or copy"),
    "truncated in the weights": (truncate(-4), WEIGHTS, "Download or copy"),
    "noise": (lambda d: (d / WEIGHTS).write_bytes(bytes(range(256)) * 9), WEIGHTS, "Download or copy"),
    "header of noise": (
        lambda d: (d / WEIGHTS).write_bytes((16).to_bytes(8, "little") + b"\xff" * 40),
        WEIGHTS,
        "Download or copy",
    ),
    "LFS pointer": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        WEIGHTS,
        "git lfs pull",
    ),
    "missing tensor": (edit_weights(lambda s: s.pop(UP)), UP, "Fetch the checkpoint again"),
    "another model's": (
        edit_weights(lambda s: s.update({"encoder.up.weight": s.pop(UP)})),
        "encoder.up.weight",
        "architecture is not the one",
    ),
    "no head": (edit_weights(lambda s: s.pop("lm_head.weight")), "lm_head.weight", "tie_word_embeddings"),
    "wrong shape": (edit_weights(lambda s: s.update({UP: torch.ones(8, 16)})), UP, "Correct config.json"),
    "tied but different": (
        edit_config(tie_word_embeddings=True),
        "lm_head.weight",
        '"tie_word_embeddings" to',
    ),
    "index is no JSON": (
        shards(lambda d, f: (d / "model.safetensors.index.json").write_text("oops")),
        "index.json",
        "Fetch the index again",
    ),
    "index without map": (
        shards(lambda d, f: (d / "model.safetensors.index.json").write_text("{}")),
        "weight_map",
        "Fetch the index again",
    ),
    "missing shard": (
        shards(lambda d, f: (d / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors",
        "Fetch the missing shards",
    ),
    "truncated shard": (
        shards(lambda d, f: (d / "model-00002-of-00002.safetensors").write_bytes(b"x" * 50)),
        "model-00002-of-00002.safetensors",
        "Download or copy",
    ),
    "index promises more": (
        shards(lambda d, f: f.update({"extra.weight": "model-00001-of-00002.safetensors"})),
        "extra.weight",
        "Fetch the shards again",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_directory_is_refused_when_opened(what: str, model: Model, tmp_path: Path) -> None:
    damage, named, cure = BAD[what]
    shutil.copytree(model("llama"), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "model")
    message = str(caught.value)
    assert str(tmp_path / "model") in message
    assert named in message
    assert cure in message
    assert all(isinstance(fault, Fault) for fault in caught.value.faults)


def test_shards_undamaged_open(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "model")
    shards(lambda d, f: None)(tmp_path / "model")
    assert open_model(tmp_path / "model").names() == open_model(model("llama")).names()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_when_read(value: float, model: Model, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "model")
    edit_weights(lambda s: s[UP][3].fill_(value))(tmp_path / "model")
    source = open_model(tmp_path / "model")
    with pytest.raises(ModelError, match=rf"{UP}.*16 of 384 NaN or infinite. Fetch"):
        source.tensor(UP)
    with pytest.raises(ModelError, match="NaN or infinite"):
        source.weight_OI(UP.removesuffix(".weight"))


def test_all_faults_are_told_together(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "model")
    edit_weights(lambda s: (s.pop(UP), s.update({"lm_head.weight": torch.ones(2, 2)})))(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "model")
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/absent/model", "nothing there"),
        ("./absent", "nothing there"),
        ("a/b/c", "nothing there"),
        ("someone/a-model-that-is-not-here", "hub"),
    ],
)
def test_what_is_nowhere(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(spec)


def test_files_are_no_directories(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Give the directory that holds"):
        open_model(model("llama") / WEIGHTS)
    with pytest.raises(ModelError, match="a directory to build"):
        open_model(model("llama") / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="an empty directory"):
        open_model(tmp_path / "empty")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ModelError, match="Mend the file"):
        open_model(tmp_path / "list.json", build_dir=tmp_path / "built")


def test_names_that_do_not_exist_bring_near_ones(model: Model) -> None:
    source = open_model(model("llama"))
    with pytest.raises(ModelError, match=UP):
        source.tensor("model.layers.1.mlp.up_prj.weight")
    with pytest.raises(ModelError, match=UP.removesuffix(".weight")):
        source.weight_OI("model.layers.1.mlp.up_prj")


def test_a_missing_tokenizer_is_said(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Copy the tokenizer's files"):
        load_tokenizer(model("llama"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="Copy the tokenizer's files again"):
        load_tokenizer(tmp_path)


def test_a_whole_model_with_holes_is_refused(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "model")
    edit_weights(lambda s: s.pop(UP))(tmp_path / "model")
    with pytest.raises(ModelError, match=UP):
        load_model(tmp_path / "model")


def test_devices_and_dtypes_by_name() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_dtype("auto") is None
    assert resolve_dtype("bfloat16") == torch.bfloat16
    for wrong in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match="device"):
            resolve_device(wrong)
    with pytest.raises(InputError, match="float16"):
        resolve_dtype("flaot16")
