"""Sentences, pairs of them and their classes: how they are read, tokenised, kept and padded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compresskit.data import check, open_corpus
from compresskit.data.example import Example
from compresskit.data.examples import ExampleRows, examples, pad_stack
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
PAIRED = "premise\thypothesis\tlabel\na b\tc\t1\nd\te f g\t0\nh\ti\t2\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of BERT's form: one token a word, segments told apart."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", model_input_names=names)


def write(path: Path, body: str) -> DataSpec:
    path.write_text(body)
    return DataSpec(source=str(path))


def read(spec: DataSpec, split: str = "all", notes: list[str] | None = None) -> list[Example]:
    return list(open_corpus(replace(spec, examples=True)).examples(split, notes))


def made(
    spec: DataSpec, tokenizer: Any, cache: Path, context_length: int = 32, **options: Any
) -> ExampleRows:
    options = {"split": "all"} | options
    return examples(spec, tokenizer, context_length=context_length, cache=cache, **options)


def test_sentences_and_pairs_are_found_by_the_names_of_columns(tmp_path: Path) -> None:
    bodies = {
        'label\tsentence\n1\ta "b\n0\tc\n': [Example('a "b', None, 1), Example("c", None, 0)],
        "label\tcontent\n1\ta\n0\tc\n": [Example("a", None, 1), Example("c", None, 0)],
        "review\tid\na\t7\n": [Example("a")],
        "idx\tquestion1\tQuestion2\n3\ta\tb\n": [Example("a", "b")],
        "text_a\ttext_b\tLabel\na\tb\t1.0\nc\td\t\ne\tf\t-1\n": [
            Example("a", "b", 1),
            Example("c", "d"),
            Example("e", "f"),
        ],
        PAIRED: [Example("a b", "c", 1), Example("d", "e f g", 0), Example("h", "i", 2)],
    }
    for number, (body, expected) in enumerate(bodies.items()):
        assert read(write(tmp_path / f"{number}.tsv", body)) == expected


def test_other_kinds_of_tables(
    tmp_path: Path, fake_hub: Callable[[dict[str, datasets.Dataset]], None]
) -> None:
    expected = [Example("a", "b", 1), Example("c", "d", 0)]
    rows = [
        {"sentence1": "a", "sentence2": "b", "label": 1},
        {"sentence1": "c", "sentence2": "d", "label": 0},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read(DataSpec(source=str(tmp_path / name))) == expected
    fake_hub({"train": datasets.Dataset.from_list(rows)})
    assert read(DataSpec(source="owner/set:small")) == expected
    assert read(write(tmp_path / "a.txt", "one line\n\ntwo\n")) == [Example("one line"), Example("two")]


def test_columns_and_classes_that_the_user_names(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.csv", "x,y,mood,label\na,b,good,5\nc,d,bad,6\n")
    named = replace(spec, column="y", pair="x", label="mood", labels=("bad", "good"))
    assert read(named) == [Example("b", "a", 1), Example("d", "c", 0)]
    assert read(replace(spec, column="y")) == [Example("b", None, 5), Example("d", None, 6)]
    assert read(replace(spec, column="y", label="")) == [Example("b"), Example("d")]
    other = write(tmp_path / "b.csv", "label,class\nsome words,1\n")
    assert read(replace(other, column="label")) == [Example("some words", None, 1)]
    assert DataSpec(pair="x").examples
    assert not DataSpec(column="x").examples


def test_a_table_without_a_header_has_columns_by_number(tmp_path: Path) -> None:
    body = "gj04\t1\t\tthe sailors\ngj04\t0\t*\tthe weights\n"
    spec = write(tmp_path / "a.tsv", body)
    named = replace(spec, header=False, column="column_4", label="column_2")
    assert read(named) == [Example("the sailors", None, 1), Example("the weights", None, 0)]
    with pytest.raises(DataError, match=r"column_1, column_2.*"):
        read(replace(named, column="sentence"))
    for wrong in (spec, replace(spec, column="sentence"), replace(spec, examples=True)):
        (fault,) = check(wrong, "data")
        assert "set data.header=false and name columns by number, as in column_2" in fault.cure


@pytest.mark.parametrize("body", ["0\tone long string\n1\ttwo\n", "0,one\n1,two\n"])
def test_the_first_row_of_a_table_without_a_header_is_never_taken_for_one(tmp_path: Path, body: str) -> None:
    spec = write(tmp_path / ("a.tsv" if "\t" in body else "a.csv"), body)
    for one in (spec, replace(spec, examples=True)):
        (fault,) = check(one, "data")
        assert "the names of columns in the first line, got the number 0" in str(fault)
    assert len(read(replace(spec, header=False))) == 2
    assert read(replace(spec, column="one long string" if "\t" in body else "one")) == [Example("two")]


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such column": (PAIRED, {"column": "premis"}, "Did you mean: premise"),
    "no such pair": (PAIRED, {"column": "premise", "pair": "b"}, r"a column called 'b'.*Set data.pair"),
    "no such label": (PAIRED, {"label": "labels"}, r"a column called 'labels'.*Did you mean: label"),
    "pair alone": (PAIRED, {"pair": "hypothesis"}, "the column of the first sentence"),
    "two labels": ("text\tlabel\tclass\na\t1\t2\n", {}, "'label' and 'class'.*data.label"),
    "two pairs": (
        "premise\thypothesis\ttext1\ttext2\na\tb\tc\td\n",
        {},
        "'text1' and 'text2'; or 'premise' and 'hypothesis'",
    ),
    "pair and text": ("premise\thypothesis\ttext\na\tb\tc\n", {}, "one sentence or one pair"),
    "several": ("x\ty\na\tb\n", {}, "Set data.column and data.pair"),
    "names as classes": ("text\tlabel\na\tgood\n", {}, r":2: .*Set data.labels.*\[negative, positive\]"),
    "a score": ("text\tlabel\na\t3.8\n", {}, "the number of a class in column 'label', got '3.8'"),
    "below -1": ("text\tlabel\na\t-2\n", {}, "the number of a class"),
    "unknown name": ("text\tlabel\na\tgod\n", {"labels": ("bad", "good")}, "a class among bad, good.*'god'"),
    "too high": ("text\tlabel\na\t2\n", {"labels": ("bad", "good")}, "a class below 2"),
    "field more": ("text\tlabel\na\t1\nb\t0\tc\n", {}, ":3: expected 2 fields as in the header, got 3"),
    "field less": ("text\tlabel\na\t1\nb\n", {}, ":3: expected 2 fields as in the header, got 1"),
    "same name": ("text\ttext\tlabel\na\tb\t1\n", {}, "'text' twice"),
    "dialogue": (PAIRED, {"columns": ("premise",)}, "examples or dialogues"),
    "supervise": (PAIRED, {"supervise": "all"}, "examples or dialogues"),
    "blank": ("premise\thypothesis\n \t \n", {}, "1 blank documents"),
    "one side everywhere": ("premise\thypothesis\na\t \n", {}, "none with text on every side"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_full_before_anything_runs(tmp_path: Path, name: str) -> None:
    body, options, words = BAD[name]
    spec = replace(write(tmp_path / "a.tsv", body), examples=True, **options)
    with pytest.raises(DataError, match=f"(?s){words}"):
        read(spec)
    faults = check(spec, "recipe.yaml:3 data")
    assert faults
    assert all(fault.where.startswith("recipe.yaml:3 data: ") and fault.cure for fault in faults)


def test_a_missing_label_column_of_text_is_told(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r":2: expected a column called 'label'"):
        read(spec)
    with pytest.raises(DataError, match="a table for pair"):
        read(replace(write(tmp_path / "a.txt", "x\n"), pair="b"))


def test_one_sided_pairs_are_counted_and_left_out(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.tsv", "premise\thypothesis\na\tb\nc\t \n \td\n\t\ne\tf\n")
    notes: list[str] = []
    assert read(spec, "all", notes) == [Example("a", "b"), Example("e", "f")]
    assert notes == [
        f"{spec.source}: 1 of 5 documents are blank and were left out.",
        f"{spec.source}: 2 of 5 pairs have one side only and were left out, the first at {spec.source}:3.",
    ]
    assert check(replace(spec, examples=True), "data") == []


def test_what_a_limit_leaves_behind_is_told_all_the_same(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.tsv", "premise\thypothesis\na\t \nb\tc\nd\te\n")
    notes: list[str] = []
    assert read(replace(spec, documents=1), "all", notes) == [Example("b", "c")]
    assert len(notes) == 1


def test_the_same_text_is_on_one_side_of_the_split_whatever_its_label(tmp_path: Path) -> None:
    lines = [f"w{i}\t{label}\n" for label in (0, 1) for i in range(200)]
    spec = write(tmp_path / "a.tsv", "text\tlabel\nfirst\t0\nsecond\t0\n" + "".join(lines))
    spec = replace(spec, validation_fraction=0.3)
    train, validation = read(spec, "train"), read(spec, "validation")
    assert len(train) + len(validation) == 402
    assert not {one.text for one in train} & {one.text for one in validation}


def test_a_language_model_refuses_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = write(tmp_path / "a.tsv", PAIRED)
    with pytest.raises(DataError, match="text or dialogues, got sentences with classes"):
        packed(replace(spec, examples=True), tokenizer, context_length=8, cache=tmp_path / "c")
    (fault,) = check(spec, "data")
    assert "data.examples=true for pairs of sentences" in fault.cure


def test_rows_are_what_the_tokenizer_makes_of_each_example(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = write(tmp_path / "a.tsv", PAIRED)
    rows = made(spec, tokenizer, tmp_path / "c")
    assert len(rows) == 3
    for index, one in enumerate(read(spec)):
        row, expected = rows[index], tokenizer(one.text, one.pair)
        assert list(row) == ["input_ids", "token_type_ids", "label"]
        for name in ("input_ids", "token_type_ids"):
            value = row[name]
            assert isinstance(value, torch.Tensor)
            assert value.dtype == torch.int64
            assert value.tolist() == expected[name]
        assert row["label"] == one.label
        assert rows.lengths[index] == len(expected["input_ids"])
    assert rows[-1]["label"] == 2
    assert (rows.num_labels, rows.num_tokens, rows.warnings) == (3, int(rows.lengths.sum()), ())
    with pytest.raises(IndexError):
        rows[3]


def test_a_tokenizer_without_segments_gives_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
    )
    rows = made(write(tmp_path / "a.tsv", "text\nx\ny z\n"), plain, tmp_path / "c")
    assert list(rows[0]) == ["input_ids", "label"]
    assert (rows[0]["label"], rows.num_labels) == (-100, 0)
    assert list(pad_stack([rows[0], rows[1]])) == ["input_ids", "attention_mask", "labels"]


def test_long_examples_are_cut_as_the_tokenizer_does_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    body = "premise\thypothesis\tlabel\na b c d e f g\th i\t0\na\tb\t\nc\td e f g h i j\t1\n"
    spec = write(tmp_path / "a.tsv", body)
    rows = made(spec, tokenizer, tmp_path / "c", context_length=7)
    for index, one in enumerate(read(spec)):
        expected = tokenizer(one.text, one.pair, truncation="longest_first", max_length=7)
        assert rows[index]["input_ids"].tolist() == expected["input_ids"]  # type: ignore[union-attr]
        assert rows[index]["token_type_ids"].tolist() == expected["token_type_ids"]  # type: ignore[union-attr]
    assert rows.lengths.tolist() == [7, 5, 7]
    assert rows.warnings == (
        f"{spec.source}: 2 of 3 examples are longer than the context of 7 tokens and were cut.",
        f"{spec.source}: 1 of 3 examples have no class.",
    )
    assert made(spec, tokenizer, tmp_path / "c", context_length=32).lengths.tolist() == [12, 5, 11]
    with pytest.raises(DataError, match="at least 5 tokens for a pair"):
        made(spec, tokenizer, tmp_path / "c", context_length=4)


def test_single_sentences_and_pairs_of_one_source_keep_their_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "a.tsv", PAIRED)
    write(tmp_path / "more" / "b.tsv", "text\tlabel\nz\t1\n")
    spec = DataSpec(source=str(tmp_path / "more"))
    rows = made(spec, tokenizer, tmp_path / "c")
    expected = [tokenizer(one.text, one.pair)["input_ids"] for one in read(spec)]
    assert [row["input_ids"].tolist() for row in (rows[i] for i in range(4))] == expected  # type: ignore[union-attr]


def test_a_second_reading_comes_from_the_cache_and_other_options_do_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec, cache = write(tmp_path / "a.tsv", PAIRED), tmp_path / "c"
    first = made(spec, tokenizer, cache)
    made(spec, tokenizer, cache, rows=2)
    made(replace(spec, examples=True), tokenizer, cache)
    assert len(list(cache.iterdir())) == 1
    folder = next(cache.iterdir())
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(stamps) == {"tokens.bin", "types.bin", "starts.npy", "labels.npy", "entry.json"}
    again = made(spec, tokenizer, cache)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert np.array_equal(first.lengths, again.lengths)
    others = [
        replace(spec, column="premise"),
        replace(spec, label=""),
        replace(spec, column="premise", label=""),
        replace(spec, labels=("a", "b", "c")),
    ]
    for other in others:
        made(other, tokenizer, cache)
    made(spec, tokenizer, cache, context_length=16)
    assert len(list(cache.iterdir())) == 6
    (folder / "labels.npy").write_bytes((folder / "labels.npy").read_bytes()[:-1] + b"\1")
    with pytest.warns(UserWarning, match=r"labels.npy differs"):
        assert made(spec, tokenizer, cache)[2]["label"] == 2


def test_a_part_of_the_rows_is_spread_over_all(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"a\t{i}\n" for i in range(10)))
    rows = made(spec, tokenizer, tmp_path / "c", rows=5)
    assert [rows[i]["label"] for i in range(5)] == [0, 2, 4, 6, 8]
    assert (len(rows.lengths), rows.num_tokens, rows.num_labels) == (5, 15, 10)


def test_a_batch_is_padded_to_its_longest_row() -> None:
    rows = [
        {"input_ids": torch.tensor([1, 7, 2]), "token_type_ids": torch.tensor([0, 1, 1]), "label": 3},
        {"input_ids": torch.tensor([1]), "token_type_ids": torch.tensor([0]), "label": -100},
    ]
    batch = pad_stack(rows, 9)
    assert batch["input_ids"].tolist() == [[1, 7, 2], [1, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [3, -100]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_real_benchmarks(tmp_path: Path, shared_data: Path) -> None:
    bert = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "bert-base-uncased")
    sst2 = made(DataSpec(source=str(shared_data / "sst2")), bert, tmp_path, 64, split="validation")
    assert (len(sst2), sst2.num_labels) == (872, 2)
    text = bert.decode(sst2[0]["input_ids"], skip_special_tokens=True)
    assert text == "one long string of cliches."
    cola = DataSpec(source=str(shared_data / "cola"), header=False, column="column_4", label="column_2")
    assert check(cola, "data") == []
    counts = {split: len(made(cola, bert, tmp_path, 64, split=split)) for split in ("train", "validation")}
    assert counts == {"train": 8551, "validation": 527 + 516}
