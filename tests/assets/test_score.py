"""Bits per byte: every token scored once, windows equal to a slow oracle, gzip as gzip says."""

from __future__ import annotations

import gzip
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compresskit.assets.score import gzip_bits_per_byte, score, windows
from compresskit.assets.teacher_model import train_tokenizer

TEXTS = ["def one():\n    return 1\n" * 6, "x", "caf\u00e9 \U0001f600 and more words to read\n" * 3]


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_each_token_after_the_first_is_scored_once(length: int, context: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, context - 1))
    scored: list[int] = []
    for begin, first, end in windows(length, context, overlap):
        assert 0 <= begin < first < end <= begin + context
        assert begin == 0 or first - begin == overlap
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocabulary=270)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_windows_equal_the_oracle(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    context, overlap = 16, 5
    nats = 0.0
    count = 0
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            for t in range(1, len(ids)):  # one token at a time, from the head of its window
                hops = 0 if t < context else (t - context) // (context - overlap) + 1
                begin = hops * (context - overlap)
                logits = model(torch.tensor([ids[begin:t]]), use_cache=False).logits[0, -1]
                nats -= float(torch.log_softmax(logits, -1)[ids[t]])
                count += 1
    found = score(model, tokenizer, TEXTS, context=context, overlap=overlap)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.num_tokens == count
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.documents == len(TEXTS)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.num_bytes, rel=1e-5)
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-5)


def test_what_cannot_be_scored_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="overlap"):
        score(model, tokenizer, TEXTS, context=16, overlap=16)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="z")
    with pytest.raises(ValueError, match="BOS"):
        score(model, plain, TEXTS, context=16, overlap=4)


def test_gzip() -> None:
    sizes = [len(gzip.compress(text.encode(), 9, mtime=0)) for text in TEXTS]
    total = sum(len(text.encode()) for text in TEXTS)
    assert gzip_bits_per_byte(TEXTS) == 8 * sum(sizes) / total
    assert gzip_bits_per_byte(TEXTS, together=True) < gzip_bits_per_byte(TEXTS)
