"""The bundled teacher is a real language model that plain transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.assets import teacher_path
from compresskit.assets.score import gzip_bits_per_byte, score
from compresskit.data.stdlib import stdlib_split

MOST_BITS_PER_BYTE = 2.0
SMALL_BYTES = 9_000


def sample() -> list[str]:
    """A few held-out files, small enough for one core."""
    paths = [
        path for _, path in stdlib_split("validation", 0.05) if 2_000 < path.stat().st_size < SMALL_BYTES
    ]
    return [path.read_text(encoding="utf-8") for path in paths[:5]]


def test_it_is_what_the_package_says() -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_path())
    assert model.dtype == torch.bfloat16
    assert 4_000_000 < model.num_parameters() < 4_400_000
    assert model.config.max_position_embeddings == 512
    assert (teacher_path() / "model.safetensors").stat().st_size < 10_000_000
    assert (teacher_path() / "generation_config.json").exists()


def test_its_tokenizer_knows_every_byte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())
    assert len(tokenizer) == 4096
    every = "".join(map(chr, range(0x800))) + "\u20ac\U0001f600"
    ids = tokenizer(every, verbose=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == every


def test_it_predicts_held_out_files_better_than_gzip() -> None:
    texts = sample()
    model = AutoModelForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32)
    found = score(model, AutoTokenizer.from_pretrained(teacher_path()), texts, context=512)
    assert found.bits_per_byte <= MOST_BITS_PER_BYTE
    assert found.bits_per_byte < gzip_bits_per_byte(texts)


def test_its_card_tells_the_figures() -> None:
    facts = json.loads((teacher_path() / "loss_curve.json").read_text())
    card = (teacher_path() / "README.md").read_text()
    held_out = facts["held_out"]
    assert held_out["model_bits_per_byte"] <= MOST_BITS_PER_BYTE
    for name in ("model_bits_per_byte", "gzip_9_bits_per_byte", "gzip_9_together_bits_per_byte"):
        assert f"| {held_out[name]:.3f} |" in card
    assert "Apache License 2.0" in card
    assert "PSF License" in card


@pytest.mark.parametrize("prompt", ["import ", "def main():\n    "])
def test_it_writes_text(prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())
    model = AutoModelForCausalLM.from_pretrained(teacher_path())
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith(prompt)
    assert len(text) > len(prompt)
