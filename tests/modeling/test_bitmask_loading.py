"""Bitmask directories through from_pretrained and compresskit.load, saved again, refused where damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import compresskit as ck
from compresskit.errors import FormatError, InputError
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
        (lambda t: t.update({f"{UP}.mask": t[f"{UP}.mask"] ^ 1}), "expected"),
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
