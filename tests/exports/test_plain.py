"""Packed artifacts read as dense ones, and the targets that transformers loads by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import compresskit as ck
from compresskit.errors import FormatError, OutputError, UnknownMethodError
from compresskit.exports.plain import Dense
from compresskit.formats import checkpoint
from compresskit.formats.grid import same_grid
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.modeling.packed import packed_fault, unpacked
from tests.exports.models import TOKENS, as_users_see_it, on_grids, packed
from tests.tiny import tiny_llama

SCHEMES = ["w8a8", "w8a16", "w4a16-g32", "w4a16-g32-asym", "w4a8-g32", "fp8"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("dense") / "model"
    return open_model(tiny_llama(place, hidden_size=64, dtype=torch.bfloat16, tie_word_embeddings=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_artifact_reads_as_the_dense_one_it_was_made_from(
    dense: ModelSource, scheme: str, tmp_path: Path
) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"down_proj": scheme, "q_proj": scheme})
    back = unpacked(packed(stage, tmp_path / "packed", scheme))
    assert back.names() == stage.names()
    assert back.is_quantised
    assert "quantization_config" not in back.config.to_dict()
    for name in stage.names():
        assert torch.equal(back.tensor(name), stage.tensor(name)), name
        assert (back.dtype(name), back.shape(name)) == (stage.dtype(name), stage.shape(name))
    for layer in stage.anatomy.linears:
        assert same_grid(back.grid(layer), stage.grid(layer)), layer
    assert torch.equal(back.tensor("lm_head.weight"), stage.tensor("model.embed_tokens.weight"))


def test_a_packed_artifact_becomes_dense(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a8"})
    source = packed(stage, tmp_path / "packed", "w8a8")
    (said,) = ck.export(source.directory, to="dense", out=tmp_path / "out")
    assert "inputs of 14 layers" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"compresskit.json", "recipe.yaml", "grids.safetensors"}
    plain = open_model(tmp_path / "out")
    assert not plain.is_compressed
    assert all(torch.equal(plain.tensor(name), stage.tensor(name)) for name in stage.names())
    with torch.no_grad():
        assert torch.equal(load_model(plain)(TOKENS).logits, load_model(stage)(TOKENS).logits)


def test_packing_again_gives_the_same_bytes(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w4a16-g32"})
    first = packed(stage, tmp_path / "packed", "w4a16-g32").directory
    for name, directory in (("of-packed", first), ("of-stage", stage.directory)):
        assert ck.export(directory, to="compressed-tensors", out=tmp_path / name) == ()
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (first / file).read_bytes()


@pytest.mark.slow
def test_plain_transformers_loads_nf4(dense: ModelSource, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    stage = on_grids(dense, tmp_path / "stage", {"proj": "nf4"})
    ck.export(stage.directory, to="bitsandbytes", out=tmp_path / "out")
    weights, logits = as_users_see_it(tmp_path / "out")
    assert len(weights) == 15
    for layer, weight in weights.items():
        assert torch.equal(weight, stage.weight_OI(layer)), layer
    with torch.no_grad():
        ours = load_model(stage)(TOKENS).logits
    assert (logits - ours).abs().max() <= 0.02 * ours.abs().max()  # both compute in bfloat16
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 0.6 * (stage.directory / "model.safetensors").stat().st_size


def test_the_fault_of_packed_weights_names_the_stage_and_the_cure(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a8"})
    source = packed(stage, tmp_path / "packed", "w8a8")
    said = str(packed_fault(source, "model"))
    assert "already quantised by stage 2-quantize (w8a8)" in said
    assert f"Start from {stage.directory}, or write it dense with `compresskit export" in said
    assert "--to dense -o DENSE" in said
    (source.directory / "compresskit.json").unlink()
    assert "already quantised (compressed-tensors)" in str(packed_fault(source, "model"))


def test_what_cannot_be_is_told_before_anything_is_written(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a16"})
    cases = [
        (dense, "compressed-tensors", "expected quantised layers, got none. Quantise it first"),
        (stage, "bitsandbytes", "expected nf4 in groups of 64, got w8a16 in model.layers.0.self_attn.q_proj"),
    ]
    for source, to, message in cases:
        with pytest.raises(FormatError, match=message):
            ck.export(source.directory, to=to, out=tmp_path / "out")
    with pytest.raises(UnknownMethodError, match=r"the name of an export target.*Did you mean: gguf"):
        ck.export(dense.directory, to="guff", out=tmp_path / "out")
    with pytest.raises(OutputError, match="something that compresskit did not write"):
        ck.export(dense.directory, to="dense", out=stage.directory, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage"]


def test_foreign_packing_is_refused(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a16"})
    source = packed(stage, tmp_path / "packed", "w8a16")
    config = json.loads((source.directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (source.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="a packing that compresskit reads, got gptq"):
        ck.export(source.directory, to="dense", out=tmp_path / "out")


def test_nothing_half_written_stays(
    dense: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Dense, model: ModelSource, out: Path) -> tuple[str, ...]:
        (out / "part").write_text("half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(Dense, "write", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        ck.export(dense.directory, to="dense", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_never_replaced(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a16"})
    source = packed(stage, tmp_path / "packed", "w8a16")
    with pytest.raises(OutputError, match="Add --overwrite"):
        ck.export(stage.directory, to="dense", out=source.directory)
    with pytest.raises(OutputError, match="one that holds it"):
        ck.export(source.directory, to="dense", out=source.directory, overwrite=True)
    assert (source.directory / "compresskit.json").is_file()
    ck.export(stage.directory, to="dense", out=source.directory, overwrite=True)
    assert not open_model(source.directory).is_compressed


@pytest.mark.parametrize("to", ["dense", "compressed-tensors"])
def test_a_model_with_an_adapter_is_refused(dense: ModelSource, to: str, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a16"})
    (stage.directory / "adapter").mkdir()
    with pytest.raises(FormatError, match=r"an adapter beside it that no target holds.*finish merge"):
        ck.export(stage.directory, to=to, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["stage", "packed"])
def test_what_is_packed_is_read_back(
    dense: ModelSource, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w4a16-g32"})
    packed(stage, tmp_path / "packed", "w4a16-g32")
    whole = checkpoint.write_shards

    def damage(out: Path, tensors: Iterable[tuple[str, torch.Tensor]], **rest: Any) -> None:
        whole(out, ((n, t ^ 1 if n.endswith("up_proj.weight_packed") else t) for n, t in tensors), **rest)

    monkeypatch.setattr(checkpoint, "write_shards", damage)
    with pytest.raises(FormatError, match=r"2 that differ and 0 missing: model.layers.0.mlp.up_proj.weight"):
        ck.export(tmp_path / start, to="compressed-tensors", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
