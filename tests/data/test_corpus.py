"""Sources, splits, blank documents, hub data sets, and the plan-time check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compresskit.data import check, documents, open_corpus
from compresskit.data.source import mark_of
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError


def jsonl(path: Path, texts: list[str]) -> DataSpec:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSpec(source=str(path))


def split(spec: DataSpec, name: str) -> list[str]:
    return list(documents(spec, name))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=2, max_size=30),
    st.floats(0, 0.99),
)
def test_train_and_validation_are_a_partition(tmp_path: Path, texts: list[str], fraction: float) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts).source
    spec = DataSpec(source=source, validation_fraction=fraction)
    train, validation = split(spec, "train"), split(spec, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert split(spec, "all") == texts
    assert train[0] == texts[0]
    assert validation[0] == texts[1]


def test_about_the_fraction_is_held_out_and_the_rest_stays_when_it_grows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(4000)]).source
    few = set(split(DataSpec(source=source), "validation"))
    many = set(split(DataSpec(source=source, validation_fraction=0.2), "validation"))
    assert 150 < len(few) < 250
    assert 700 < len(many) < 900
    assert few <= many


def test_the_number_of_documents_limits_each_split(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)]).source
    spec = DataSpec(source=source, documents=3, validation_fraction=0.5)
    assert [len(split(spec, s)) for s in ("train", "validation", "all")] == [3, 3, 3]
    with pytest.raises(DataError, match="at least 1"):
        documents(DataSpec(source=source, documents=0))
    with pytest.raises(DataError, match="train or validation or all"):
        documents(spec, "test")


def test_files_of_a_folder_keep_the_split_they_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-00.jsonl", ["a", "b"])
    jsonl(tmp_path / "more" / "train.jsonl", ["c"])
    jsonl(tmp_path / "dev.jsonl", ["d"])
    jsonl(tmp_path / "test.jsonl", ["e"])
    jsonl(tmp_path / ".hidden" / "train.jsonl", ["f"])
    (tmp_path / "README.md").write_text("not data")
    spec = DataSpec(source=str(tmp_path))
    notes: list[str] = []
    assert list(open_corpus(spec).documents("train", notes)) == ["c", "a", "b"]
    assert notes == [f"{tmp_path}: files of a test split were left out: test.jsonl."]
    assert split(spec, "validation") == ["d"]
    assert split(spec, "all") == ["c", "a", "b", "d"]
    assert split(DataSpec(source=f"{tmp_path}/*.jsonl"), "train") == ["a", "b"]
    assert split(DataSpec(source=f"{tmp_path}/**/train*.jsonl"), "all") == ["c", "a", "b"]


@pytest.mark.parametrize("names", [["valid.jsonl"], ["test.jsonl"], ["valid.jsonl", "test.jsonl"]])
def test_a_folder_of_nothing_but_test_or_validation_is_divided_like_any_other(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        jsonl(tmp_path / name, [f"{name} {i}" for i in range(4)])
    spec = DataSpec(source=str(tmp_path))
    assert len(split(spec, "train")) + len(split(spec, "validation")) == 4 * len(names)
    assert split(spec, "train")


def test_words_that_mark_a_split() -> None:
    marks = [mark_of((n,)) for n in ("valid_head.txt", "training.csv", "latest.txt", "dev-00.tsv", "x.txt")]
    assert marks == ["validation", "train", "", "validation", ""]
    assert mark_of(("train", "0001.test.txt")) == "test"


def test_blank_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "a.jsonl", ["a", " \n", "b", ""])
    notes: list[str] = []
    assert list(open_corpus(spec).documents("all", notes)) == ["a", "b"]
    assert notes == [f"{spec.source}: 2 of 4 documents are blank and were left out."]
    assert check(spec, "data") == []


@pytest.mark.parametrize("body", ["", "\n  \n", "   "])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_source_without_text_is_an_error(tmp_path: Path, name: str, body: str) -> None:
    path = tmp_path / name
    path.write_text(body)
    spec = DataSpec(source=str(path))
    with pytest.raises(DataError, match="at least one document with text, got an empty source"):
        split(spec, "train")
    assert [f.expected for f in check(spec, "data")] == ["at least one document with text"]


def test_a_source_of_blank_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 2 blank documents"):
        split(jsonl(tmp_path / "a.jsonl", ["", "\n"]), "train")


def test_a_lone_surrogate_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "x\\ud800"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: .*lone surrogate at character 1"):
        split(DataSpec(source=str(path)), "all")


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    jsonl(tmp_path / "stories.jsonl", ["a"])
    for name, words in {
        f"{tmp_path}/storys.jsonl": "stories.jsonl",
        f"{tmp_path}/no/such/folder/x.csv": "stories.jsonl",
        f"{tmp_path}/*.csv": "no match",
        "./nothing": "no such file",
        "what is this?": "no such file",
    }.items():
        if name.endswith("?"):
            words = "no match"  # a question mark makes it a pattern
        with pytest.raises(DataError, match=words):
            open_corpus(DataSpec(source=name))
        (fault,) = check(DataSpec(source=name), "recipe.yaml:3 data")
        assert fault.where.startswith("recipe.yaml:3 data: ")
        assert fault.cure
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder with none"):
        open_corpus(DataSpec(source=str(tmp_path / "empty")))


def test_check_finds_the_faults_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    spec = DataSpec(source=str(tmp_path), validation_fraction=1.0)
    faults = check(spec, "data")
    assert [f.where.rsplit("/", 1)[-1] for f in faults] == [
        "a.jsonl:2",
        "b.txt:1",
        "c.csv:1",
        faults[3].where,
    ]
    assert "validation_fraction" in faults[3].where
    assert check(DataSpec(), "data") == []
    assert "data: split: " in str(check(DataSpec(split="test"), "data")[0])
    assert "no column" in str(check(DataSpec(column="text"), "data")[0])


def tables(splits: tuple[str, ...]) -> dict[str, datasets.Dataset]:
    columns = {name: {"id": [1, 2, 3], "text": [f"{name} {i}" for i in range(3)]} for name in splits}
    return {name: datasets.Dataset.from_dict(table) for name, table in columns.items()}


def test_a_hub_data_set_with_its_own_validation_split(
    fake_hub: Callable[[dict[str, datasets.Dataset]], None],
) -> None:
    fake_hub(tables(("train", "validation", "test")))
    spec = DataSpec(source="owner/set:small")
    assert split(spec, "train") == [f"train {i}" for i in range(3)]
    assert split(spec, "validation") == [f"validation {i}" for i in range(3)]
    assert check(spec, "data") == []
    assert open_corpus(spec).fingerprint() == open_corpus(spec).fingerprint()
    faults = check(DataSpec(source="owner/set:small", column="txt"), "data")
    assert "columns id, text" in str(faults[0])


def test_a_hub_data_set_without_one(fake_hub: Callable[[dict[str, datasets.Dataset]], None]) -> None:
    fake_hub(tables(("train",)))
    spec = DataSpec(source="owner/set:small")
    assert sorted(split(spec, "train") + split(spec, "validation")) == [f"train {i}" for i in range(3)]


def test_a_hub_name_offline_is_an_error() -> None:
    spec = DataSpec(source="no-such-owner/no-such-set")
    with pytest.raises(
        DataError, match="no-such-owner/no-such-set: expected a file that exists, or a data set"
    ):
        split(spec, "train")
    assert len(check(spec, "data")) == 1


def test_real_text(shared_data: Path) -> None:
    stories = DataSpec(source=str(shared_data / "tinystories" / "valid_head_clean.jsonl"))
    assert len(split(stories, "all")) == 934
    lines = DataSpec(source=str(shared_data / "instruct" / "belle_eval_set.json"), column="question")
    assert len(split(lines, "all")) > 100
    tsv = DataSpec(source=str(shared_data / "sst2" / "dev.tsv"))
    assert len(split(tsv, "all")) == 872
    assert check(DataSpec(source=str(shared_data / "tinystories" / "valid_head.txt")), "data") == []
