"""Bitmask directories through from_pretrained and compresskit.load, saved again, refused where damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import compresskit as ck
from compresskit.errors import FormatError, InputError
from compresskit.formats.shards import Stored
from compresskit.kernels import choice
from compresskit.kernels.choice import ENDS
from compresskit.kernels.memory import _trimmer
from compresskit.modeling import bitmask_quantizer
from compresskit.modeling.sparse_linear import choices_of, sparse_layers
from tests.tiny import byte_tokenizer, tiny_llama

TOKENS = torch.arange(1, 20)[None]


@pytest.fixture(autouse=True)
def bitmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSKIT_LAYOUT", "bitmap")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` with zeros, and ``packed``, of a small Llama with biases."""
    place = tmp_path_factory.mktemp("loading")
    tiny_llama(place / "model", hidden_size=64, dtype=torch.bfloat16, attention_bias=True)
    stages = (ck.Prune("magnitude", pattern="60%"),)
    ck.run(ck.Recipe(model=str(place / "model"), stages=stages), place / "dense", measures=())
    ck.export(place / "dense", to="bitmask", out=place / "packed")
    return place


def text(model: object) -> list[int]:
    made = model.generate(TOKENS, max_new_tokens=12, do_sample=False, pad_token_id=0)  # type: ignore[attr-defined]
    return list(made[0].tolist())


@pytest.mark.parametrize("way", ["plain", "load"])
def test_it_loads_says_the_same_and_is_saved_again(way: str, place: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(place / "dense")
    plain = AutoModelForCausalLM.from_pretrained
    model = plain(place / "packed") if way == "plain" else ck.load(place / "packed")
    assert len(sparse_layers(model)) == 14
    assert {str(choice) for choice in choices_of(model).values()} == {"bitmap"}
    assert text(model) == text(dense)
    model.save_pretrained(tmp_path / "again")
    was, now = (load_file(d / "model.safetensors") for d in (place / "packed", tmp_path / "again"))
    assert was.keys() == now.keys()
    assert all(torch.equal(now[name], was[name]) and now[name].dtype == was[name].dtype for name in was)
    configs = [json.loads((d / "config.json").read_text()) for d in (place / "packed", tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = plain(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_record_of_latency_names_the_layout_of_every_layer(place: Path) -> None:
    (record,) = ck.bench(place / "packed", measures=("latency",))
    assert len(record.settings["layouts"]) == 14
    assert set(record.settings["layouts"].values()) == {"bitmap"}
    assert any("model.layers.*.mlp.down_proj (2)" in note for note in record.notes), record.notes


def test_another_type_and_no_head(place: Path, tmp_path: Path) -> None:
    wide = AutoModelForCausalLM.from_pretrained(place / "packed", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    assert torch.allclose(wide(TOKENS).logits, dense(TOKENS).logits, atol=1e-5)
    wide.save_pretrained(tmp_path / "wide")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert again.dtype == torch.float32
    assert torch.equal(again(TOKENS).logits, wide(TOKENS).logits)
    body = AutoModel.from_pretrained(place / "packed")
    assert len(sparse_layers(body)) == 14


def test_gpt2_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    stages = (ck.Prune("magnitude", pattern="60%"),)
    ck.run(ck.Recipe(model=str(tmp_path / "gpt2"), stages=stages), tmp_path / "dense", measures=())
    ck.export(tmp_path / "dense", to="bitmask", out=tmp_path / "packed")
    model, dense = ck.load(tmp_path / "packed"), ck.load(tmp_path / "dense")
    assert len(sparse_layers(model)) == 8
    assert torch.allclose(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-5)


def test_who_never_heard_of_us_is_stopped(place: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM;"
        f"AutoModelForCausalLM.from_pretrained({str(place / 'packed')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown quantization type, got compresskit-bitmask" in done.stderr


@pytest.mark.parametrize("first", ["compresskit", "transformers"])
def test_the_order_of_imports_does_not_matter(first: str, place: Path) -> None:
    second = {"compresskit": "transformers", "transformers": "compresskit"}[first]
    code = (
        f"import {first}, {second}; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(place / 'packed')!r});"
        "assert type(m.model.layers[0].mlp.up_proj).__name__ == 'SparseLinear'"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


UP = "model.layers.0.mlp.up_proj"
Harm = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda t: t.update({f"{UP}.mask": t[f"{UP}.mask"] ^ 1}), "a value for each of"),
        (lambda t: t.update({f"{UP}.values": t[f"{UP}.values"] * torch.nan}), "finite numbers"),
        (lambda t: t.update({f"{UP}.values": t[f"{UP}.values"][1:]}), "as config.json says"),
        (lambda t: t.update({f"{UP}.values": t[f"{UP}.values"].float()}), "as config.json says, got float32"),
        (lambda t: t.update({f"{UP}.mask": t[f"{UP}.mask"].int()}), "as config.json says, got int32"),
        (lambda t: t.pop(f"{UP}.mask"), "every tensor of a packed layer, got no mask"),
    ],
)
def test_what_contradicts_itself_is_not_loaded(harm: Harm, told: str, place: Path, tmp_path: Path) -> None:
    tensors = load_file(place / "packed" / "model.safetensors")
    harm(tensors)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((place / "packed" / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{UP}.*{told}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(FormatError, match=rf"{UP}.*{told}"):
        ck.load(tmp_path)


def test_what_is_asked_of_a_load(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESSKIT_LAYOUT")
    model = ck.load(place / "packed", layout="dense")
    assert {str(choice) for choice in choices_of(model).values()} == {"dense"}
    with pytest.raises(InputError, match="layout: expected"):
        ck.load(place / "packed", layout="bitmp")
    with pytest.raises(
        InputError, match="expected a bitmask checkpoint, whose layouts can be chosen, got layout"
    ):
        ck.load(place / "dense", layout="bitmap")


@pytest.mark.parametrize("way", ["plain", "load"])
def test_layers_are_read_and_forgotten_one_at_a_time(
    way: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Stored.read
    seen: list[tuple[str, weakref.ref[torch.Tensor]]] = []

    def reads(stored: Stored) -> torch.Tensor:
        layer = stored.key.rpartition(".")[0]
        assert not [name for name, tensor in seen if name != layer and tensor() is not None]
        made = read(stored)
        seen.append((layer, weakref.ref(made)))
        return made

    given_back: list[None] = []
    monkeypatch.setattr(Stored, "read", reads)
    monkeypatch.setattr(bitmask_quantizer, "give_back", lambda: given_back.append(None))
    model = (AutoModelForCausalLM.from_pretrained if way == "plain" else ck.load)(place / "packed")
    assert len({name for name, _ in seen}) == len(sparse_layers(model)) == 14
    assert all(tensor() is None for _, tensor in seen)
    assert len(given_back) == 14


def test_another_type_is_taken_as_transformers_made_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    read = Stored.read
    monkeypatch.setattr(Stored, "read", lambda stored: keys.append(stored.key) or read(stored))
    wide = AutoModelForCausalLM.from_pretrained(place / "packed", dtype=torch.float32)
    assert {layer.dtype for layer in sparse_layers(wide).values()} == {torch.float32}
    assert {key.rpartition(".")[2] for key in keys} == {"mask"}


def test_a_checkpoint_in_pieces_and_one_in_memory(place: Path, tmp_path: Path) -> None:
    whole = ck.load(place / "packed")
    whole.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")  # type: ignore[operator]
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    pieces = AutoModelForCausalLM.from_pretrained(tmp_path / "pieces", device_map={"": "cpu"})
    state = load_file(place / "packed" / "model.safetensors")
    config = AutoConfig.from_pretrained(place / "packed")
    given = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16)
    assert len(sparse_layers(given)) == 14
    for model in (pieces, given):
        assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)


def test_where_there_is_no_room_dense_weights_are_not_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPRESSKIT_LAYOUT")
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    both = {"bitmap", "dense"}

    def times(*_: object, **asked: object) -> tuple[dict[str, dict[int, float]], tuple[str, ...]]:
        """Dense wins all but single tokens."""
        ms = {tokens: 1.0 for ends in ENDS for tokens in ends}
        return {"dense": ms, "bitmap": {1: 0.5, 2: 9.0, 4: 9.0}, "bitmap expanded": ms}, ()

    def loaded(free: int, asked: str = "") -> tuple[set[str], set[str]]:
        """What stays, and what is noted."""
        monkeypatch.setattr(bitmask_quantizer, "free_bytes", lambda device: free)
        found = choices_of(ck.load(place / "packed", resident=asked)).values()
        assert len({(one.resident, one.notes) for one in found}) == 1
        return {name for one in found for name in one.resident}, {n for one in found for n in one.notes}

    monkeypatch.setattr(choice, "contest", times)
    monkeypatch.setattr(choice, "_known", {})
    layers = sparse_layers(ck.load(place / "packed", layout="bitmap")).values()
    linear = sum(one.layer.bytes + one.layer.dense_bytes for one in layers)
    assert loaded(10**12) == (both, set())
    kept, notes = loaded(linear)
    assert kept == {"bitmap"}
    assert [note[:22] for note in notes] == ["cpu has 0.00 GB free, "]
    assert loaded(0, "fastest") == (both, set())
    assert loaded(0, "packed") == ({"bitmap"}, set())
    monkeypatch.setenv("COMPRESSKIT_RESIDENT", "fastest")
    assert loaded(0) == (both, set())


PEAK = """
import sys, compresskit as ck
def status(*keys):
    said = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return [int(said[key].split()[0]) * 1024 for key in keys]
ck.load(sys.argv[1] + "/small")
start = sum(status("RssAnon", "RssFile"))
model = ck.load(sys.argv[1] + "/large")
tensors = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
peak, *now = status("VmHWM", "RssAnon", "RssFile")
print(tensors, sum(now) - start, peak - start)
"""


@pytest.mark.skipif(_trimmer() is None, reason="the C library is not glibc")
def test_loading_takes_little_more_memory_than_stays(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    for name, layers in (("small", 1), ("large", 12)):
        dense = tmp_path / f"{name}-dense"
        tiny_llama(dense, num_hidden_layers=layers, dtype=torch.bfloat16, **sizes)
        tensors = load_file(dense / "model.safetensors")
        for key, tensor in tensors.items():
            if "_proj" in key:
                tensor *= torch.rand(tensor.shape) < 0.5
        save_file(tensors, dense / "model.safetensors", {"format": "pt"})
        ck.export(dense, to="bitmask", out=tmp_path / name)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensors_bytes, stay_bytes, peak_bytes = map(int, done.stdout.split())
    assert tensors_bytes > 35 << 20
    assert stay_bytes < tensors_bytes + (28 << 20), "and not the file beside it"
    assert peak_bytes < stay_bytes + (16 << 20), "a layer's weight is 1.4 MB dense"


def test_a_real_model_says_the_same(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "models" / "TinyStories-656K"
    stages = (ck.Prune("magnitude", pattern="60%"),)
    plan = ck.plan(ck.Recipe(model=str(source), stages=stages, export=("bitmask",)))
    ck.run(plan, tmp_path / "out", measures=())
    packed = tmp_path / "out" / "exports" / "bitmask"
    told = int(next(n for n in plan.notes if "export bitmask" in n).split()[2].replace(",", ""))
    stored = load_file(packed / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == told
    dense = ck.load(tmp_path / "out")
    for model in (ck.load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        made = [
            m.generate(TOKENS, max_new_tokens=40, do_sample=False, pad_token_id=0) for m in (model, dense)
        ]
        assert torch.equal(*made)
