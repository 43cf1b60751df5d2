"""Packed rows: what a row holds, and that a document never sees its neighbour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compresskit.assets.teacher_model import train_tokenizer
from compresskit.data.cache import Entry
from compresskit.data.pack import UNSUPERVISED, PackedRows, packed
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError

LOOP = "for i in range(3):\n    print(i)\n"
TEXTS = ["def one():\n    return 1\n", "x = 2\n", "", LOOP, "y", "import os\n" * 9]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocabulary=280)


@pytest.fixture
def source(tmp_path: Path) -> DataSpec:
    import json

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    return DataSpec(source=str(file))


def entry(documents: list[list[int]]) -> Entry:
    flat = np.array([i for d in documents for i in d], dtype="<u2")
    starts = np.cumsum([0, *(len(d) for d in documents)])[:-1]
    return Entry(Path(), flat, starts.astype(np.int64), ())


documents_of_ids = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=30), min_size=1, max_size=12)


@given(documents_of_ids, st.integers(2, 20))
def test_rows_are_the_tokens_in_order_and_positions_restart(documents: list[list[int]], length: int) -> None:
    rows = PackedRows(entry(documents), length)
    flat = [i for d in documents for i in d]
    firsts = {sum(len(x) for x in documents[:i]) for i in range(len(documents))}
    assert len(rows) == max(1, len(flat) // length)
    for r in range(len(rows)):
        row = rows[r]
        expected = flat[r * length : (r + 1) * length]
        assert row["input_ids"].tolist() == expected
        position = -1
        for t, token in enumerate(expected):
            begins = t == 0 or r * length + t in firsts
            position = 0 if begins else position + 1
            assert row["position_ids"][t] == position
            assert row["labels"][t] == (UNSUPERVISED if begins else token)
        assert all(value.dtype == torch.int64 for value in row.values())


@given(documents_of_ids, st.integers(2, 20))
def test_crossing_documents_lets_positions_run_on(documents: list[list[int]], length: int) -> None:
    rows = PackedRows(entry(documents), length, cross_documents=True)
    apart = PackedRows(entry(documents), length)
    for r in range(len(rows)):
        assert rows[r]["position_ids"].tolist() == list(range(len(rows[r]["input_ids"])))
        assert torch.equal(rows[r]["labels"], apart[r]["labels"])


@given(st.integers(1, 400), st.integers(1, 60))
def test_a_part_of_the_rows_is_spread_over_all(total: int, wanted: int) -> None:
    some = PackedRows(entry([[i % 500 for i in range(total)]]), 4, rows=wanted)
    whole = max(1, total // 4)
    begins = (some._windows[:, 0] // 4).tolist()
    assert len(begins) == min(wanted, whole)
    assert begins == sorted(set(begins))
    assert begins[0] == 0
    assert begins[-1] >= whole - -(-whole // len(begins))


def test_a_row_beyond_the_end_is_an_index_error() -> None:
    rows = PackedRows(entry([[1, 2, 3, 4]]), 2)
    assert torch.equal(rows[-1]["input_ids"], rows[1]["input_ids"])
    with pytest.raises(IndexError):
        rows[2]
    assert len(list(rows)) == 2


def tiny(kind: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        model: torch.nn.Module = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=64))
    model.set_attn_implementation(attention)  # type: ignore[operator]
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_logits_equal_those_of_separate_documents(kind: str, attention: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 9, 3, 20, 2, 7, 12, 1, 1, 30, 5]
    documents = [torch.randint(0, 64, (n,), generator=generator).tolist() for n in lengths]
    rows = PackedRows(entry(documents), 32)
    assert len(rows) == 3
    model = tiny(kind, attention)
    items = [rows[i] for i in range(batch)]
    ids = torch.stack([item["input_ids"] for item in items])
    positions = torch.stack([item["position_ids"] for item in items])
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        crossing = model(input_ids=ids, use_cache=False).logits
        for b in range(batch):
            begins = (positions[b] == 0).nonzero()[:, 0].tolist()
            assert len(begins) > 1
            for begin, end in zip(begins, [*begins[1:], 32], strict=True):
                alone = model(input_ids=ids[b : b + 1, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(together[b, begin:end], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, crossing, atol=1e-3), "the model does not see its context at all"


def test_special_tokens_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast, source: DataSpec) -> None:
    cache = Path(source.source).parent / "cache"
    rows = packed(source, tokenizer, split="all", context_length=16, cache=cache)
    texts = [text for text in TEXTS * 3 if text]
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    assert rows.num_documents == len(texts)
    assert [i for row in rows for i in row["input_ids"].tolist()] == ids[: len(ids) // 16 * 16]
    assert ids[0] == tokenizer.bos_token_id
    assert rows.warnings == (f"{source.source}: 3 of 18 documents are blank and were left out.",)


def test_eos_ends_each_document_of_a_tokenizer_that_adds_nothing(
    tokenizer: PreTrainedTokenizerFast, source: DataSpec
) -> None:
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    plain = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    cache = Path(source.source).parent / "cache"
    rows = packed(source, plain, split="all", context_length=8, cache=cache)
    ids = [i for text in TEXTS * 3 if text for i in [*plain(text)["input_ids"], plain.eos_token_id]]
    assert [i for row in rows for i in row["input_ids"].tolist()] == ids[: len(ids) // 8 * 8]


def test_the_splits_are_disjoint_and_whole(tokenizer: PreTrainedTokenizerFast, source: DataSpec) -> None:
    cache = Path(source.source).parent / "cache"
    count = {
        split: packed(source, tokenizer, split=split, context_length=8, cache=cache).num_documents
        for split in ("train", "validation", "all")
    }
    assert count["train"] + count["validation"] == count["all"]
    assert min(count.values()) >= 1


def test_a_split_without_text_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a single document\n")
    spec = DataSpec(source=str(file))
    assert packed(spec, tokenizer, split="train", context_length=8, cache=tmp_path / "c").num_documents == 1
    with pytest.raises(DataError, match="validation"):
        packed(spec, tokenizer, split="validation", context_length=8, cache=tmp_path / "c")


def test_a_row_of_one_token_is_refused(tokenizer: PreTrainedTokenizerFast, source: DataSpec) -> None:
    with pytest.raises(DataError, match="context_length"):
        packed(source, tokenizer, context_length=1, cache=Path(source.source).parent)


@given(documents_of_ids, st.integers(2, 20))
def test_rows_without_a_token_to_learn_are_counted(documents: list[list[int]], length: int) -> None:
    rows = PackedRows(entry(documents), length)
    idle = sum(bool((rows[i]["labels"] == UNSUPERVISED).all()) for i in range(len(rows)))
    said = f"{idle} of {len(rows)} rows have no token to learn: each token begins a document."
    assert rows.warnings == ((said,) if idle else ())


def test_documents_without_a_token_are_counted_and_left_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    core.normalizer = normalizers.Replace("x", "")
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "x"}\n{"text": "b"}\n')
    plain = PreTrainedTokenizerFast(tokenizer_object=core)
    rows = packed(DataSpec(source=str(file)), plain, split="all", context_length=2, cache=tmp_path / "c")
    assert (rows.num_documents, rows[0]["input_ids"].tolist()) == (2, [0, 1])
    assert rows.warnings == (
        f"{file}: 1 documents have no token and were left out.",
        "1 of 1 rows have no token to learn: each token begins a document.",
    )


@settings(max_examples=20)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_every_text_survives_the_tokenizer(texts: list[str]) -> None:
    tokenizer = train_tokenizer(TEXTS, vocabulary=280)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A text that spells a special token is read as one, and comes back as it was.
        assert tokenizer.decode(ids) == text
