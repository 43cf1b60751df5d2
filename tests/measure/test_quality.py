"""Quality against a token-by-token loop, and against published figures of two real models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compresskit.data.dialogue import Dialogue
from compresskit.errors import DataError, InputError, NumericError
from compresskit.measure.load import load_model
from compresskit.measure.quality import Quality, quality

from .conftest import byte_tokenizer

TEXTS = ["abc", "", "a long line of text, longer than the context " * 3, "z", "zwei Zeilen\nund \u00fc\u20ac"]
CONTEXT = 24


def slow_quality(model: torch.nn.Module, tokenizer, texts: list[str], context: int) -> tuple[float, int, int]:
    """One forward pass of one row for every token: nats, tokens, bytes."""
    nats, tokens, num_bytes = 0.0, 0, 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:context]
        for i in range(1, len(ids)):
            logits_V = model(torch.tensor([ids[:i]])).logits[0, -1]
            nats -= float(logits_V.double().log_softmax(0)[ids[i]])
            tokens += 1
            num_bytes += 1  # one token is one byte here
    return nats, tokens, num_bytes


@pytest.mark.parametrize("max_logits_bytes", [1, 4 * 258 * 10, 4 * 258 * 100, 1 << 30])
@torch.no_grad()
def test_matches_the_slow_loop(llama_dir: Path, max_logits_bytes: int) -> None:
    model, tokenizer = load_model(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    texts = TEXTS[:4]
    nats, tokens, num_bytes = slow_quality(model, tokenizer, texts, CONTEXT)
    got = quality(model, tokenizer, texts, context_length=CONTEXT, max_logits_bytes=max_logits_bytes)
    assert (got.tokens, got.bytes, got.documents, got.cut_documents) == (tokens, num_bytes, 3, 1)
    assert got.nats_per_token == pytest.approx(nats / tokens, abs=1e-5)
    assert got.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_logits_stay_under_the_bound(llama_dir: Path) -> None:
    model, tokenizer = load_model(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    seen: list[int] = []
    model.register_forward_hook(lambda m, args, out: seen.append(out.logits.numel() * 4))
    bound = 4 * 258 * 10
    quality(model, tokenizer, TEXTS, context_length=CONTEXT, max_logits_bytes=bound)
    assert seen
    assert max(seen) <= bound


@torch.no_grad()
def test_windows_score_every_byte_once_with_half_a_context_behind(llama_dir: Path) -> None:
    model, tokenizer = load_model(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    text = TEXTS[2]
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, done = 0.0, 1
    while done < len(ids):  # the plain recipe: a window, its new tokens, half a context further
        end = min(len(ids), CONTEXT if done == 1 else done + CONTEXT // 2)
        window = ids[max(0, end - CONTEXT) : end]
        log_TV = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for i in range(done, end):
            at = i - max(0, end - CONTEXT)
            nats -= float(log_TV[at - 1, ids[i]])
        done = end
    got = quality(model, tokenizer, [text], context_length=CONTEXT, overflow="window")
    assert (got.tokens, got.bytes) == (len(ids) - 1, len(text.encode()))
    assert got.nats_per_token == pytest.approx(nats / got.tokens, abs=1e-5)


def test_bytes_of_a_text_that_is_not_ascii(llama_dir: Path) -> None:
    model, tokenizer = load_model(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    got = quality(model, tokenizer, [TEXTS[4]], context_length=CONTEXT)
    assert got.bytes == got.tokens == len(TEXTS[4].encode())


@pytest.mark.parametrize(("special", "start", "scored"), [("eos", "eos", 3), (None, "nothing", 2)])
def test_start_without_a_bos(llama_dir: Path, special: str | None, start: str, scored: int) -> None:
    tokenizer = byte_tokenizer(**({"eos_token": "</s>"} if special else {}))
    got = quality(load_model(llama_dir), tokenizer, ["abc"], context_length=CONTEXT)
    assert (got.start, got.tokens, got.bytes) == (start, scored, scored)


def test_errors(llama_dir: Path) -> None:
    model, tokenizer = load_model(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    with pytest.raises(DataError, match="at least one token"):
        quality(model, tokenizer, ["", ""], context_length=CONTEXT)
    with pytest.raises(InputError, match="context_length: expected at least 2"):
        quality(model, tokenizer, TEXTS, context_length=1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericError, match="document 1 "):
        quality(model, tokenizer, ["", "abc"], context_length=CONTEXT)


def real_quality(shared_data: Path, name: str, num_documents: int | None = None) -> Quality:
    place = shared_data / "models" / name
    lines = (shared_data / "tinystories" / "valid_head_clean.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(place)
    return quality(load_model(place), tokenizer, texts, context_length=512, max_documents=num_documents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "nats", "bits"),
    [("stories260K", 332_331, 1.3786, 0.965), ("TinyStories-656K", 183_098, 3.1378, 1.082)],
)
def test_published_figures(shared_data: Path, name: str, tokens: int, nats: float, bits: float) -> None:
    got = real_quality(shared_data, name)
    assert got.tokens == tokens
    assert got.nats_per_token == pytest.approx(nats, abs=1e-3)
    assert got.bits_per_byte == pytest.approx(bits, abs=1e-3)


TALKS = [
    Dialogue((("hi", "Yo!"), ("ok?", "zw\u00f6lf"))),
    Dialogue((("a long prompt " * 10, "fits"),)),
    Dialogue((("x", "a response longer than the context " * 3),)),
]


@torch.no_grad()
def test_of_dialogues_the_responses_and_what_ends_them_are_scored(llama_dir: Path) -> None:
    model, tokenizer = load_model(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    end = tokenizer.eos_token_id
    nats, tokens, num_bytes, context = 0.0, 0, 0, 60
    for talk in TALKS:
        ids: list[int] = []
        scored: set[int] = set()
        for i, (prompt, response) in enumerate(talk.turns):
            before = "\n\n" * (i > 0) + f"User:\n{prompt}\n\nAssistant:\n"
            ids += tokenizer(before, add_special_tokens=False)["input_ids"]
            said = [*tokenizer(response, add_special_tokens=False)["input_ids"], end]
            scored |= set(range(len(ids), len(ids) + len(said)))
            ids += said
        # Of the second talk the left of the prompt goes, of the third the end of the response.
        begin = max(0, len(ids) - context) if talk is TALKS[1] else 0
        for t in sorted(scored):
            if t < begin + context:
                logits_V = model(torch.tensor([ids[begin:t]])).logits[0, -1]
                nats -= float(logits_V.double().log_softmax(0)[ids[t]])
                tokens += 1
                num_bytes += ids[t] != end
    got = quality(model, tokenizer, TALKS, context_length=context, max_logits_bytes=4 * 258 * 30)
    assert (got.tokens, got.bytes, got.documents, got.cut_documents) == (tokens, num_bytes, 3, 2)
    assert got.nats_per_token == pytest.approx(nats / tokens, abs=1e-5)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert (got.scored, got.start) == ("responses", "its wording")
    with pytest.raises(InputError, match="truncate"):
        quality(model, tokenizer, TALKS, context_length=60, overflow="window")
