"""Dialogues in rows: whole ones where they fit, each learnt once, none without a label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import compresskit as ck
from compresskit.data.cache import Entry, Piece, build_entry
from compresskit.data.pack import UNSUPERVISED, PackedRows, cut, packed
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError
from tests.tiny import byte_tokenizer, tiny_llama

N = UNSUPERVISED


def entry(*pieces: Piece) -> Entry:
    flat = np.array([i for p in pieces for i in p.ids], dtype="<u2")
    starts = np.cumsum([0, *(len(p.ids) for p in pieces)])[:-1].astype(np.int64)
    runs = [(s + a, s + b) for s, p in zip(starts, pieces, strict=True) for a, b in p.learnt or ()]
    return Entry(Path(), flat, starts, (), np.array(runs, dtype=np.int64).reshape(-1, 2))


def talk(first: int, prompt: int, response: int) -> Piece:
    """Ids that count up from ``first``."""
    ids = list(range(first, first + prompt + response))
    return Piece(ids, [(prompt, prompt + response)])


def test_rows_by_hand() -> None:
    rows = PackedRows(entry(talk(10, 2, 2), talk(20, 1, 2), talk(30, 2, 3), talk(40, 1, 2)), 8)
    # The third does not fit beside the first two; its first token fills the row and is not learnt there.
    assert [row["input_ids"].tolist() for row in rows] == [
        [10, 11, 12, 13, 20, 21, 22, 30],
        [30, 31, 32, 33, 34, 40, 41, 42],
    ]
    assert [row["labels"].tolist() for row in rows] == [
        [N, N, 12, 13, N, 21, 22, N],
        [N, N, 32, 33, 34, N, 41, 42],
    ]
    assert [row["position_ids"].tolist() for row in rows] == [
        [0, 1, 2, 3, 0, 1, 2, 0],
        [0, 1, 2, 3, 4, 0, 1, 2],
    ]
    assert rows.warnings == ()


def test_the_last_row_reaches_back_and_learns_nothing_twice() -> None:
    rows = PackedRows(entry(talk(10, 2, 2), talk(20, 2, 2), talk(30, 1, 2)), 8)
    assert rows[1]["input_ids"].tolist() == [13, 20, 21, 22, 23, 30, 31, 32]
    assert rows[1]["labels"].tolist() == [N] * 6 + [31, 32]
    assert rows[1]["position_ids"].tolist() == [0, 0, 1, 2, 3, 0, 1, 2]
    (short,) = PackedRows(entry(talk(10, 1, 1)), 8)
    assert short["labels"].tolist() == [N, 11]


def test_a_long_dialogue_loses_the_left_of_its_prompt() -> None:
    rows = PackedRows(entry(talk(10, 2, 2), talk(20, 20, 5), talk(60, 1, 2)), 16)
    assert rows[1]["input_ids"].tolist() == list(range(29, 45))
    assert rows[1]["labels"].tolist() == [N] * 11 + [40, 41, 42, 43, 44]
    assert rows.warnings == (
        "1 of 3 dialogues are longer than the context of 16 tokens and were cut; 9 of 9 tokens to learn are "
        "left.",
    )


def test_a_response_longer_than_the_context_keeps_its_beginning_and_half_a_context_of_prompt() -> None:
    (row,) = PackedRows(entry(talk(20, 20, 50)), 16)
    assert row["input_ids"].tolist() == list(range(32, 48))
    assert row["labels"].tolist() == [N] * 8 + list(range(40, 48))
    rows = PackedRows(entry(talk(20, 1, 50)), 16)
    assert rows[0]["labels"].tolist() == [N, *range(21, 36)]
    assert "15 of 50 tokens to learn are left" in rows.warnings[0]


@given(st.integers(2, 40), st.integers(1, 100), st.integers(1, 100))
def test_a_cut_keeps_what_it_says(context: int, prompt: int, response: int) -> None:
    length = prompt + response
    if length <= context:
        return
    begin = cut(length, prompt, context)
    kept = prompt - begin
    assert 0 <= begin <= length - context
    assert kept >= min(prompt, max(1, context // 8))
    if response + max(1, context // 8) <= context:
        assert begin + context == length
    else:
        assert kept == min(prompt, context // 2)


turns = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3)


def dialogue(shape: list[tuple[int, int]]) -> Piece:
    ids, runs = [], []
    for prompt, response in shape:
        runs.append((len(ids) + prompt, len(ids) + prompt + response))
        ids += [7] * prompt + [9] * response
    return Piece(ids, runs)


@settings(max_examples=200)
@given(st.lists(turns, min_size=1, max_size=15), st.integers(2, 60))
def test_every_row_has_labels_and_every_response_is_learnt_once(
    shapes: list[list[tuple[int, int]]], length: int
) -> None:
    pieces = [dialogue(shape) for shape in shapes]
    rows = PackedRows(entry(*pieces), length)
    total = sum(len(p.ids) for p in pieces)
    labels = 0
    for row in rows:
        assert len(row["input_ids"]) == min(length, total)
        learnt = row["labels"] != N
        assert learnt.any()
        assert not learnt[row["position_ids"] == 0].any()
        assert set(row["labels"][learnt].tolist()) == {9}
        labels += int(learnt.sum())
    long = [p for p in pieces if len(p.ids) > length]
    wanted = sum(b - a for p in pieces for a, b in p.learnt or ())
    assert labels == wanted if not long else labels <= wanted
    assert bool(rows.warnings) == bool(long)


def test_crossing_dialogues_lets_positions_run_on() -> None:
    rows = PackedRows(entry(talk(10, 2, 2), talk(20, 2, 2)), 8, cross_documents=True)
    assert rows[0]["position_ids"].tolist() == list(range(8))
    assert rows[0]["labels"].tolist() == [N, N, 12, 13, N, N, 22, 23]


def test_learnt_tokens_survive_the_cache(tmp_path: Path) -> None:
    pieces = [talk(10, 2, 2), Piece([5, 6, 7, 8], [(1, 2), (3, 4)]), talk(40, 1, 3)]
    build_entry(tmp_path, "k", pieces, dtype="<u2")
    made = build_entry(tmp_path, "k", [], dtype="<u2")
    assert made.learnt is not None
    assert made.learnt.tolist() == [[2, 4], [5, 6], [7, 8], [9, 12]]
    assert PackedRows(made, 12)[0]["labels"].tolist() == [N, N, 12, 13, N, 6, N, 8, N, 41, 42, 43]
    assert build_entry(tmp_path, "text", [Piece([1, 2])], dtype="<u2").learnt is None


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [{"question": "q" * (i % 30), "answer": f"answer {i}"} for i in range(1, 60)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["question"]))
    return str(path)


def rows_of(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, length: int = 128) -> PackedRows:
    return packed(
        spec, tokenizer, split="all", context_length=length, cache=Path(spec.source).parent / "cache"
    )


def labels_of(rows: PackedRows) -> list[int]:
    return [i for row in rows for i in row["labels"].tolist() if i != N]


def test_a_file_of_dialogues_becomes_rows(source: str) -> None:
    tokenizer = byte_tokenizer()
    rows = rows_of(DataSpec(source=source), tokenizer)
    said = tokenizer.decode(labels_of(rows)).split("</s>")
    assert said == [json.loads(line)["answer"] for line in Path(source).read_text().splitlines()] + [""]
    everything = rows_of(DataSpec(source=source, supervise="all"), tokenizer)
    assert len(everything) == len(rows)
    assert torch.equal(everything[0]["input_ids"], rows[0]["input_ids"])
    assert len(labels_of(everything)) == everything.num_tokens - everything.num_documents


def test_the_key_of_dialogues_follows_the_template_and_what_is_learnt(source: str) -> None:
    cache = Path(source).parent / "cache"
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    counts = []
    for spec, tok in [
        (DataSpec(source=source), tokenizer),
        (DataSpec(source=source, supervise="all"), tokenizer),
        (DataSpec(source=source), other),
        (DataSpec(source=source, column="answer"), tokenizer),
        (DataSpec(source=source, columns=("answer", "question")), tokenizer),
        (DataSpec(source=source), tokenizer),
        (DataSpec(source=source, column="answer"), other),
    ]:
        rows_of(spec, tok)
        counts.append(len(list(cache.iterdir())))
    assert counts == [1, 2, 3, 4, 5, 5, 5]


def test_dialogues_without_a_token_to_learn_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "c"}\n')
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}:{{ m.content }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.BPE(vocab={"a": 0, ":": 1, "b": 2, ":b": 3, "c": 4}, merges=[(":", "b")]))
    merged = PreTrainedTokenizerFast(tokenizer_object=core)
    merged.chat_template = tokenizer.chat_template
    rows = rows_of(DataSpec(source=str(path)), merged)
    assert rows.num_documents == 1
    assert labels_of(rows) == [4]
    assert f"{path}: 1 dialogues have no token to learn and were left out." in rows.warnings
    assert any("1 responses share a token" in warning for warning in rows.warnings)
    path.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="at least one"):
        rows_of(DataSpec(source=str(path)), merged)


def test_real_chinese_dialogues(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "instruct" / "oasst_sft_zh.json"
    counted = json.loads(path.read_text(encoding="utf-8"))
    said = [text for row in counted for text in [*(turn[1] for turn in row["history"]), row["output"]]]
    tokenizer = byte_tokenizer()
    rows = packed(
        DataSpec(source=str(path)), tokenizer, split="all", context_length=1 << 15, cache=tmp_path / "cache"
    )
    assert rows.num_documents == len(counted) == 766
    assert rows.warnings == ()
    labels = labels_of(rows)
    assert len(labels) == sum(len(text.encode()) + 1 for text in said)
    assert tokenizer.decode(labels) == "".join(text + "</s>" for text in said)


def test_training_and_calibration_take_dialogues_and_tell_what_was_cut(tmp_path: Path, source: str) -> None:
    model = tiny_llama(tmp_path / "model")
    text = tmp_path / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": f"story {i} " * 9}) + "\n" for i in range(40)))
    recipe = ck.Recipe(
        model=str(model),
        data=DataSpec(source=source),
        stages=(
            ck.Prune("wanda", pattern="2:4", samples=2, context_length=32),
            ck.Finetune(steps=2, batch_size=2, context_length=32),
            ck.Finetune(
                steps=2, batch_size=2, context_length=32, data=DataSpec(source=f"{source}=1,{text}=3")
            ),
        ),
    )
    artifact = ck.run(recipe, tmp_path / "out", measures=("quality",))
    warnings = artifact.manifest["warnings"]
    assert any("longer than the context of 32 tokens and were cut" in warning for warning in warnings)
    assert any(warning.startswith("Validation: ") and "were cut" in warning for warning in warnings)
    assert any(f"{source} 25.0% of them, " in warning for warning in warnings)
    (record,) = ck.bench(model, data=DataSpec(source=source), measures=("quality",))
    assert record.values["scored"] == "responses"
