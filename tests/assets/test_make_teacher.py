"""The scripts that make the teacher, on a tiny model and a few lines of text."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from compresskit.assets import publish_teacher, train_teacher
from compresskit.assets.curve import loss_svg, loss_table, thinned
from compresskit.assets.teacher_model import new_teacher, teacher_config, train_tokenizer
from compresskit.data.spec import DataSpec
from compresskit.training.fields import TrainingFields

CONTEXT = 16


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) for i in range(60)]
    text.write_text("\n".join(lines))

    def config(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
        shape = teacher_config(tokenizer)
        shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers = 16, 32, 1
        shape.num_attention_heads = shape.num_key_value_heads = 2
        shape.head_dim = 8
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape)

    for module in (train_teacher, publish_teacher):
        monkeypatch.setattr(module, "DataSpec", lambda: DataSpec(source=str(text), validation_fraction=0.2))
        monkeypatch.setattr(module, "CONTEXT", CONTEXT)
        monkeypatch.setattr(module, "new_teacher", config)
    monkeypatch.setattr(publish_teacher, "OVERLAP", 4)
    monkeypatch.setattr(
        train_teacher, "train_tokenizer", lambda texts: train_tokenizer(texts, vocabulary=270)
    )
    return tmp_path


def test_train_and_publish(small: Path) -> None:
    run, out = small / "run", small / "teacher"
    fields = TrainingFields(steps=6, batch_size=4, context_length=CONTEXT, checkpoint_every=0, eval_every=3)
    train_teacher.train(run, fields)
    publish_teacher.publish(run, out, "3.11")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in tokenizer("x")["input_ids"]
    facts = json.loads((out / "loss_curve.json").read_text())
    assert facts["training"]["steps"] == 6
    assert len([p for p in facts["curve"] if "training_loss" in p]) == 6
    card = (out / "README.md").read_text()
    assert f"{facts['held_out']['model_bits_per_byte']:.3f}" in card
    assert "{" not in card
    trained = run / "weights.safetensors"
    trained.write_bytes(trained.read_bytes().replace(b"input_layernorm", b"input_layernorX"))
    with pytest.raises(ValueError, match="holds other weights"):
        publish_teacher.publish(run, out, "3.11")


def test_rows_of_the_training_end_with_eos() -> None:
    tokenizer = train_tokenizer(["some text"], vocabulary=260)
    ids = train_teacher.with_end(tokenizer)("text")["input_ids"]
    assert ids == [*tokenizer("text")["input_ids"], tokenizer.eos_token_id]


def test_no_byte_is_unknown() -> None:
    tokenizer = train_tokenizer(["nothing of note"], vocabulary=258)
    assert len(tokenizer) == 258
    every = "".join(map(chr, range(0x800))) + "\u20ac\U0001f600"
    assert tokenizer.decode(tokenizer(every)["input_ids"], skip_special_tokens=True) == every


def test_the_same_seed_gives_the_same_teacher() -> None:
    tokenizer = train_tokenizer(["nothing of note"], vocabulary=258)
    state = torch.get_rng_state()
    one, two = new_teacher(tokenizer, seed=1).state_dict(), new_teacher(tokenizer, seed=1).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_curve() -> None:
    records = [{"step": i, "loss": 9.0 - i / 100, "seconds": i} for i in range(1, 501)]
    records += [{"step": 250, "validation_loss": 6.9}, {"step": 500, "validation_loss": 4.5}]
    points = thinned(records, 100)
    assert sum("training_loss" in p for p in points) == 100
    assert points[0] == {"step": 5, "training_loss": 8.97}
    table = loss_table(records, rows=4).splitlines()
    assert table[2:] == [
        "| 125 | 8.370 |  |",
        "| 250 | 7.120 | 6.900 |",
        "| 375 | 5.870 |  |",
        "| 500 | 4.620 | 4.500 |",
    ]
    picture = ET.fromstring(loss_svg(records))
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == 2


def test_the_clock_of_a_run_that_was_restarted() -> None:
    records = [{"seconds": s} for s in (1.0, 2.0, 3.0, 0.5, 1.5)]
    assert publish_teacher._seconds(records) == [3.0, 1.5]
