"""A checkpoint read tensor by tensor, against the module that transformers loads from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from compresskit.errors import ModelError
from compresskit.formats.shards import Pending, read_header, write_shard
from compresskit.modeling import ModelSource, load_model, load_tokenizer, open_model
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES, GQA
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_loaded_models(family: str, dtype: torch.dtype, model: Model) -> None:
    source = open_model(model(family, dtype))
    whole = load_model(source)
    names = [n for n, _ in whole.named_parameters()]
    assert list(source.names()) == names, "tied parameters once, in the module's order"
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        assert name in source
        got = source.tensor(name)
        assert got.dtype == source.dtype(name) == dtype
        assert tuple(got.shape) == source.shape(name)
        assert torch.equal(got, parameter), name
    assert source.compute_dtype == dtype
    assert source.warnings == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_is_out_by_in_whatever_class_holds_it(family: str, model: Model) -> None:
    source = open_model(model(family))
    whole = load_model(source)
    for name, linear in source.anatomy.linears.items():
        weight_OI = source.weight_OI(name)
        assert weight_OI.shape == (linear.out_features, linear.in_features)
        assert weight_OI.is_contiguous()
        module = whole.get_submodule(name)
        x = torch.randn(3, linear.in_features)
        expected = module(x) - (module.bias if linear.has_bias else 0)
        torch.testing.assert_close(x @ weight_OI.t(), expected, rtol=1e-4, atol=1e-5)


def test_shards_and_an_index_read_like_one_file(model: Model, tmp_path: Path) -> None:
    whole = load_model(model("llama"))
    whole.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded, single = open_model(tmp_path), open_model(model("llama"))
    assert sharded.names() == single.names()
    assert all(torch.equal(sharded.tensor(n), single.tensor(n)) for n in single.names())
    assert sharded.bytes == single.bytes == sum(p.nbytes for p in whole.parameters())


def test_a_prefix_too_many_and_names_of_old_are_mapped(model: Model, tmp_path: Path) -> None:
    bert = load_model(model("bert"))
    bare = hf.BertModel(bert.config, add_pooling_layer=False)
    bare.load_state_dict(bert.bert.state_dict())
    old = {
        f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in bare.state_dict().items()
    }
    old = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in old.items()}
    pooler = {"bert.pooler.dense.weight": torch.ones(16, 16), "bert.pooler.dense.bias": torch.ones(16)}
    bare.config.architectures = ["BertModel"]
    bare.config.save_pretrained(tmp_path)
    save_file(old | pooler | {"cls.seq_relationship.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    for name, parameter in bare.named_parameters():
        assert torch.equal(source.tensor(name), parameter)
    assert "cls.seq_relationship.bias" in source.warnings[0]


def test_a_tied_weight_is_found_under_either_name(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model("llama-tied"), tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert torch.equal(source.tensor("model.embed_tokens.weight"), source.tensor("lm_head.weight"))
    assert "lm_head.weight" not in source.names()
    state["model.embed_tokens.weight"] = state["lm_head.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    assert open_model(tmp_path).names() == source.names(), "stored twice and equal is as good as once"


def test_a_compressed_checkpoint_is_told_apart(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = ModelSource(tmp_path)
    assert source.is_compressed
    assert len(source.anatomy.blocks) == 3


def test_a_config_builds_the_same_model_again(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tok")
    config = hf.LlamaConfig(**GQA | {"vocab_size": 258}, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path / "cfg")
    path = tmp_path / "cfg" / "config.json"
    state = torch.get_rng_state()
    one, two, other = (
        open_model(path, tokenizer=tmp_path / "tok", build_dir=tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state is its own"
    files = sorted(p.name for p in one.directory.iterdir())
    assert files == sorted(p.name for p in two.directory.iterdir())
    assert all((one.directory / f).read_bytes() == (two.directory / f).read_bytes() for f in files)
    name = "model.layers.0.mlp.up_proj.weight"
    assert one.dtype(name) == torch.bfloat16
    assert not torch.equal(one.tensor(name), other.tensor(name))
    assert load_tokenizer(one)("hello")["input_ids"] == byte_tokenizer()("hello")["input_ids"]
    hf.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="Set vocab_size to 258"):
        open_model(tmp_path / "small" / "config.json", tokenizer=tmp_path / "tok", build_dir=tmp_path / "d")


def test_a_model_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "cfg")
    path, built = tmp_path / "cfg" / "config.json", tmp_path / "built"

    def state(directory: Path) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}

    one = open_model(path, build_dir=built, seed=1).directory
    before = state(one)
    assert open_model(path, build_dir=built, seed=1).directory == one
    assert state(one) == before
    other = open_model(path, build_dir=built, seed=2).directory
    assert other != one
    assert state(one) == before
    config = json.loads(path.read_text()) | {"rms_norm_eps": 0.5}
    path.write_text(json.dumps(config))
    third = open_model(path, build_dir=built, seed=1).directory
    assert sorted(built.iterdir()) == sorted([one, other, third]), "nothing half done is left"

    winner = (third / "model.safetensors").read_bytes()
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        shutil.copytree(third, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    raced = open_model(path, build_dir=built, seed=3).directory
    assert (raced / "model.safetensors").read_bytes() == winner, "whoever comes second uses the first one's"
    assert sorted(built.iterdir()) == sorted([one, other, third, raced])


def test_shards_are_what_the_reference_library_reads(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn]
    tensors = {f"t{i}": torch.randn(3, i + 1).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "strided": torch.randn(4, 6).t()}

    def pending(key: str) -> Pending:
        return Pending(key, tensors[key].dtype, tuple(tensors[key].shape), lambda: tensors[key])

    places = write_shard(tmp_path / "x.safetensors", [pending(key) for key in tensors])
    theirs = load_file(tmp_path / "x.safetensors")
    ours = read_header(tmp_path / "x.safetensors")
    assert places == ours
    assert theirs.keys() == ours.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert theirs[key].dtype == ours[key].read().dtype == tensor.dtype
        assert theirs[key].tolist() == ours[key].read().tolist() == tensor.tolist()
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
