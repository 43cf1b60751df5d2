"""A model streamed block by block: what is read, held, written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from compresskit.errors import ModelError, OutputError
from compresskit.formats.shards import Stored
from compresskit.modeling import StreamedModel, load_model, open_model
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES, make, tokens

UP = "model.layers.1.mlp.up_proj"


def stream(source_dir: Path, out: Path, **options: str) -> StreamedModel:
    out.mkdir()
    return StreamedModel(open_model(source_dir), out, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_bit_exact(family: str, dtype: torch.dtype, model: Model, tmp_path: Path) -> None:
    with stream(model(family, dtype), tmp_path / "out") as streamed:
        for index in (2, 0):  # in any order, and block 1 not at all
            with streamed.block(index):
                pass
    before, after = streamed.source, open_model(tmp_path / "out")
    assert before.names() == after.names()
    for name in before.names():
        assert after.dtype(name) == dtype
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    whole = load_model(after)
    ids = tokens(9, 1)[None]
    assert torch.equal(whole(ids).logits, load_model(before)(ids).logits)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4, "one shard a block, one for the rest"
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_computes_what_the_whole_model_does(
    family: str, dtype: str, model: Model, tmp_path: Path
) -> None:
    """Buffers that no checkpoint stores are the real ones: with all blocks loaded the logits are equal."""
    streamed = stream(model(family), tmp_path / "out", dtype=dtype)
    whole = load_model(model(family), dtype=dtype)
    for name, buffer in whole.named_buffers():
        assert torch.equal(streamed.module.get_buffer(name), buffer), name
        assert streamed.module.get_buffer(name).dtype == buffer.dtype
    for block in (None, *streamed.blocks):
        streamed._load(streamed._names[block])
    ids = tokens(20, 2)[None]
    assert torch.equal(streamed.module(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_one_block_or_table_is_in_memory(family: str, model: Model, tmp_path: Path) -> None:
    with stream(model(family), tmp_path / "out") as streamed:
        source = streamed.source
        sizes: dict[str | None, int] = {}
        for name in source.names():
            block = source.anatomy.block_of(name)
            sizes[block] = sizes.get(block, 0) + source.place(name).num_bytes
        tables = {name: source.place(f"{name}.weight").num_bytes for name in streamed.tables}
        assert source.anatomy.embeddings in tables
        buffers = sum(b.nbytes for b in streamed.module.buffers())
        tied = len({source.place(f"{name}.weight") for name in tables}) == 1
        outside = sizes[None] + buffers - (max(tables.values()) if tied else sum(tables.values()))
        assert streamed.resident_bytes == outside
        for name, num_bytes in tables.items():
            with streamed.table(name) as module:
                assert streamed.resident_bytes == outside + num_bytes
                assert torch.equal(module.weight, source.tensor(f"{name}.weight"))
                with streamed.table(name):
                    pass
                assert streamed.resident_bytes == outside + num_bytes
            assert streamed.resident_bytes == outside
        for index, block in enumerate(streamed.blocks):
            with streamed.block(index):
                assert streamed.resident_bytes == outside + sizes[block]
                with pytest.raises(RuntimeError, match="leave it first"), streamed.block(0):
                    pass
            assert streamed.resident_bytes == outside


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_changes_of_every_kind_are_written(family: str, model: Model, tmp_path: Path) -> None:
    linear = open_model(model(family)).anatomy.blocks[1] + "."
    with stream(model(family), tmp_path / "out") as streamed:
        source = streamed.source
        name = next(n for n in source.anatomy.linears if n.startswith(linear))
        norm = next(n for n in source.names() if n.startswith(linear) and len(source.shape(n)) == 1)
        with streamed.block(1) as block:
            weight_OI = streamed.weight_OI(name)
            assert torch.equal(weight_OI, source.weight_OI(name))
            streamed.set_weight(name, weight_OI * 2)
            assert torch.equal(streamed.weight_OI(name), weight_OI * 2)
            streamed.set_parameter(norm, torch.zeros_like(streamed.parameter(norm)))
            assert not block.get_parameter(norm.removeprefix(linear)).any()
        with streamed.block(1):  # entered again: the change is read back, and a second one joins it
            assert torch.equal(streamed.weight_OI(name), weight_OI * 2)
            streamed.set_weight(name, weight_OI * 3)
    after = open_model(tmp_path / "out")
    assert torch.equal(after.weight_OI(name), weight_OI * 3)
    assert not after.tensor(norm).any()
    for other in set(source.names()) - {norm, f"{name}.weight"}:
        assert torch.equal(after.tensor(other), source.tensor(other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_table_is_written(dtype: str, model: Model, tmp_path: Path) -> None:
    with stream(model("llama"), tmp_path / "out", dtype=dtype) as streamed:
        with streamed.table("lm_head"):
            weight_OI = streamed.weight_OI("lm_head")
            streamed.set_weight("lm_head", weight_OI * 1.01)
            assert torch.equal(weight_OI, streamed.source.weight_OI("lm_head")), "the former one stays"
        assert torch.equal(streamed.weight_OI("lm_head"), weight_OI * 1.01)
    before, after = streamed.source, open_model(tmp_path / "out")
    assert torch.equal(after.weight_OI("lm_head"), before.weight_OI("lm_head") * 1.01)
    embedding = f"{before.anatomy.embeddings}.weight"
    assert torch.equal(after.tensor(embedding), before.tensor(embedding))


def test_one_without_a_place_to_write_only_reads(tmp_path: Path) -> None:
    source = open_model(make("llama", tmp_path / "model"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with StreamedModel(source, None) as streamed:
        for index, block in enumerate(streamed.blocks):
            with streamed.block(index):
                for name in (n for n in source.names() if n.startswith(f"{block}.")):
                    assert torch.equal(streamed.parameter(name), source.tensor(name))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_block_is_read_once(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: read.append(self.key) or whole(self))
    with stream(model("llama"), tmp_path / "out") as streamed:
        for index in range(len(streamed.blocks)):
            with streamed.block(index):
                streamed.set_weight(UP, streamed.weight_OI(UP) * 2) if index == 1 else None
    assert sorted(read) == sorted(streamed.source.place(n).key for n in streamed.source.names())


def test_computing_in_less_than_is_stored_loses_nothing(model: Model, tmp_path: Path) -> None:
    """Weights stay as stored; a changed one is written as given, not as rounded for computing."""
    with stream(model("llama"), tmp_path / "out", dtype="bfloat16") as streamed, streamed.block(1):
        assert streamed.module.get_submodule(UP).weight.dtype == torch.bfloat16
        weight_OI = streamed.weight_OI(UP)
        assert weight_OI.dtype == torch.float32
        streamed.set_weight(UP, weight_OI * (weight_OI > 0))
        assert torch.equal(streamed.weight_OI(UP), weight_OI * (weight_OI > 0))
    before, after = streamed.source, open_model(tmp_path / "out")
    for name in before.names():
        expected = before.tensor(name) if name != f"{UP}.weight" else weight_OI * (weight_OI > 0)
        assert torch.equal(after.tensor(name), expected), name


def test_the_sign_of_zero_is_kept(model: Model, tmp_path: Path) -> None:
    with stream(model("llama"), tmp_path / "out") as streamed:
        for factor in (0.0, -1.0):  # all weights 0 or -0, then the other
            with streamed.block(1):
                streamed.set_weight(UP, streamed.weight_OI(UP) * factor)
    after = open_model(tmp_path / "out").weight_OI(UP)
    assert not after.any()
    assert torch.equal(after.signbit(), ~open_model(model("llama")).weight_OI(UP).signbit())


def test_two_runs_write_the_same_bytes(model: Model, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with stream(model("gemma3"), tmp_path / name) as streamed, streamed.block(1):
            streamed.set_weight(UP, streamed.weight_OI(UP) * 2)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_an_interrupted_run_leaves_no_model(model: Model, tmp_path: Path) -> None:
    streamed = stream(model("llama"), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), streamed, streamed.block(0):
        raise KeyboardInterrupt
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(tmp_path / "out")


def test_a_block_that_failed_is_not_written(model: Model, tmp_path: Path) -> None:
    streamed = stream(model("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="mine"), streamed.block(0):
        raise ValueError("mine")
    assert not list((tmp_path / "out").iterdir())
    with streamed.block(0):
        pass


def test_wrong_weights_are_refused(model: Model, tmp_path: Path) -> None:
    streamed = stream(model("llama-tied"), tmp_path / "out")
    weight_OI = streamed.source.weight_OI(UP)
    with pytest.raises(RuntimeError, match="enter its block"):
        streamed.set_weight(UP, weight_OI)
    with pytest.raises(RuntimeError, match="or table"):
        streamed.weight_OI("lm_head")
    with streamed.table("lm_head"), pytest.raises(ModelError, match="Add lm_head to ignore"):
        streamed.set_weight("lm_head", streamed.weight_OI("lm_head"))
    with streamed.block(1):
        with pytest.raises(ModelError, match=r"shape \(24, 16\), got \(16, 24\)"):
            streamed.set_weight(UP, weight_OI.t())
        with pytest.raises(ModelError, match="NaN"):
            streamed.set_weight(UP, weight_OI / 0)
        norm = "model.layers.1.input_layernorm.weight"
        with pytest.raises(ModelError, match=r"input_layernorm.*shape \(16,\), got \(3,\)"):
            streamed.set_parameter(norm, weight_OI[0, :3])
        with pytest.raises(ModelError, match="infinity"):
            streamed.set_parameter(norm, torch.full((16,), torch.inf))
    with pytest.raises(RuntimeError, match="enter its block"):
        streamed.set_parameter(norm, torch.ones(16))
    with streamed.table("lm_head"), pytest.raises(ModelError, match="a parameter of its own"):
        streamed.set_parameter("lm_head.weight", streamed.parameter("lm_head.weight"))
    with pytest.raises(OutputError, match="the model's own"):
        StreamedModel(streamed.source, streamed.source.directory)
    with pytest.raises(OutputError, match="Create it"):
        StreamedModel(streamed.source, tmp_path / "absent")


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "in")
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "stage.json",
        "README.md",
        "training_args.bin",
    ):
        (source / name).write_text(name)
    with stream(source, tmp_path / "out"):
        pass
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
    } <= names
    assert not names & {"stage.json", "README.md", "training_args.bin", "model.safetensors"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_grids_come_along(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "in")
    (source / "grids.safetensors").write_bytes(b"grids")
    with stream(source, tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "grids.safetensors").read_bytes() == b"grids"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps the count")
def test_a_large_model_needs_the_memory_of_one_block(tmp_path: Path) -> None:
    """Peak resident memory of a fresh process, as the operating system counts it."""
    size = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = hf.LlamaConfig(**size, vocab_size=256, architectures=["LlamaForCausalLM"], dtype="float32")
    config.save_pretrained(tmp_path / "config")
    (tmp_path / "out").mkdir()
    code = f"""
from pathlib import Path
from compresskit.modeling import StreamedModel, open_model
source = open_model({str(tmp_path / "in")!r})
status = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
start = status("VmRSS")
with StreamedModel(source, {str(tmp_path / "out")!r}) as streamed:
    for index, block in enumerate(streamed.blocks):
        with streamed.block(index):
            for name, linear in source.anatomy.linears.items():
                if linear.block == block:
                    streamed.set_weight(name, streamed.weight_OI(name) * 2)
print(source.bytes, status("VmHWM") - start)
"""
    built = open_model(tmp_path / "config" / "config.json", build_dir=tmp_path / "built").directory
    built.rename(tmp_path / "in")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    model_bytes, growth = map(int, done.stdout.split())
    assert model_bytes > 110e6
    assert model_bytes / 12 < growth < 4 * model_bytes / 12, (
        f"{growth:,} bytes for blocks of {model_bytes // 12:,}"
    )


def test_the_index_is_one_that_transformers_writes(model: Model, tmp_path: Path) -> None:
    with stream(model("llama"), tmp_path / "out") as streamed:
        pass
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == streamed.source.bytes
    assert index["weight_map"].keys() == set(streamed.source.names())
