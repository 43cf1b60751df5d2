"""Several sources with weights: how they are named, what an epoch holds, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from compresskit.assets.teacher_model import train_tokenizer
from compresskit.data import check, open_corpus
from compresskit.data.dialogue import Dialogue
from compresskit.data.examples import examples
from compresskit.data.mixture import MixedRows, interleaved
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec, Share
from compresskit.data.wording import foresee
from compresskit.errors import DataError
from compresskit.recipe import recipe_from, resolved
from compresskit.schema import recipe_schema
from compresskit.training.order import Ordered
from compresskit.yaml12 import parse_yaml

CONTEXT = 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["abc def\n", "ghi jkl mno\n"], vocabulary=270)


def write(path: Path, word: str, count: int) -> str:
    texts = [f"{word} {hashlib.sha256(f'{word}{i}'.encode()).hexdigest()[:20]}" for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    a, b = write(tmp_path / "a.jsonl", "aa", 30), write(tmp_path / "b.jsonl", "bb", 5)
    return DataSpec(sources=(Share(source=a, weight=7), Share(source=b, weight=3)))


def mixed(spec: DataSpec, tokenizer: Any, **options: Any) -> MixedRows:
    cache = Path(spec.sources[0].source).parent / "cache"
    rows = packed(spec, tokenizer, **{"split": "all", "context_length": CONTEXT, "cache": cache} | options)
    assert isinstance(rows, MixedRows)
    return rows


def alone(spec: DataSpec, tokenizer: Any) -> list[list[tuple[int, ...]]]:
    cache = Path(spec.sources[0].source).parent / "cache"
    rows = [packed(p, tokenizer, split="all", context_length=CONTEXT, cache=cache) for p in spec.parts()]
    return [ids_of(part) for part in rows]


def ids_of(rows: Any, count: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows) if count is None else count)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 400))
def test_every_beginning_holds_the_shares(weights: list[int], count: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    made = interleaved(shares, count).tolist()
    assert len(made) == count
    seen = Counter[int]()
    for n, source in enumerate(made, 1):
        seen[source] += 1
        for i, share in enumerate(shares):
            assert abs(seen[i] - n * share) <= (1 + len(shares)) / 2 + 1e-6


def test_equal_weights_take_turns() -> None:
    assert interleaved([0.5, 0.5], 6).tolist() == [0, 1] * 3
    assert interleaved([0.75, 0.25], 8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


def test_ways_to_write_sources(tmp_path: Path) -> None:
    shares = (Share(source="a.jsonl", weight=0.7), Share(source="b.jsonl", weight=0.3))
    expected = DataSpec(sources=shares)
    columns = {"weight": 0.3, "columns": ["q", "a"]}
    schema = jsonschema.Draft202012Validator(recipe_schema())
    for data in (
        "a.jsonl=0.7,b.jsonl=0.3",
        {"source": "a.jsonl = 0.7, b.jsonl = .3"},
        {"sources": {"a.jsonl": 0.7, "b.jsonl": 0.3}},
        {"sources": [{"source": "a.jsonl", "weight": 0.7}, {"source": "b.jsonl", "weight": 0.3}]},
    ):
        recipe = recipe_from({"model": "m", "data": data, "stages": [{"finetune": {"data": data}}]}, {})
        assert recipe.data == expected
        assert recipe.stages[0].data == expected  # type: ignore[attr-defined]
        assert recipe_from(recipe.to_json(), {}) == recipe
        schema.validate(recipe.to_json())
        assert recipe_from(parse_yaml(recipe.to_yaml(), "")[0], {}) == recipe
        schema.validate({"model": "m", "data": data, "stages": [{"finetune": {}}]})
        assert DataSpec(**json.loads(json.dumps(asdict(recipe.data)))) == expected
        assert hash(recipe.data) == hash(expected)
    told = recipe_from(
        {"model": "m", "data": {"sources": {"a": 1, "b": columns}}, "stages": ["finetune"]}, {}
    )
    assert told.data.sources[1] == Share(source="b", weight=0.3, columns=("q", "a"))
    assert DataSpec(sources={"a": 1, "b": columns}) == told.data  # type: ignore[arg-type]
    assert DataSpec(source="a=b.jsonl").sources == ()
    assert DataSpec(source="a.jsonl,b.jsonl").sources == ()


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", "a", 1)
    recipe = recipe_from({"model": "m", "data": "a.jsonl=1,*.txt=2", "stages": ["finetune"]}, {})
    data = resolved(recipe).data
    assert [share.source for share in data.sources] == [str(tmp_path / "a.jsonl"), str(tmp_path / "*.txt")]
    assert data.source == data.name_of_sources


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": 0.5, "b": "much"}, "weight: expected a number, got 'much'"),
        ([{"source": "a", "wieght": 1}], r"sources\[0\]: expected a known key, got 'wieght'.*weight"),
        ([{"weight": 1}], r"sources\[0\]: expected the key source"),
        (3, "sources"),
    ],
)
def test_wrong_fields_are_said(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe_from({"model": "m", "data": {"sources": value}, "stages": ["finetune"]}, {})


def test_an_epoch_has_as_many_rows_as_all_sources_and_each_its_share(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows, (a, b) = mixed(spec, tokenizer), alone(spec, tokenizer)
    ids = ids_of(rows)
    assert len(set(a + b)) == len(a + b)
    assert len(rows) == len(a) + len(b)
    for n in range(1, len(rows) + 1):
        assert abs(sum(one in a for one in ids[:n]) - 0.7 * n) <= 1.5
    taken_b = [one for one in ids if one in b]
    assert taken_b == [b[i % len(b)] for i in range(len(taken_b))]
    assert len(taken_b) > len(b)
    taken_a = [a.index(one) for one in ids if one in a]
    assert taken_a == sorted(set(taken_a))
    assert taken_a[-1] >= len(a) - 3
    name_a, name_b = (share.source for share in spec.sources)
    assert rows.warnings == (
        f"An epoch is {len(rows)} rows, as many as all sources have: {name_a} 70.0% of them, "
        f"{len(taken_a) / len(a):.2g} times over, {name_b} 30.0% of them, "
        f"{len(taken_b) / len(b):.2g} times over.",
    )
    assert tuple(rows[-1]["input_ids"].tolist()) == ids[-1]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_training_sees_all_of_a_source_before_any_of_it_again(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows, parts = mixed(spec, tokenizer), alone(spec, tokenizer)
    epochs = 5
    order = Ordered(rows, steps=epochs * len(rows), batch_size=1, seed=3)
    ids = ids_of(order)
    for part, share in zip(parts, spec.shares, strict=True):
        mine = [part.index(one) for one in ids if one in part]
        assert abs(len(mine) - share * len(ids)) <= 2 * epochs
        for first in range(0, len(mine) - len(part) + 1, len(part)):
            assert sorted(mine[first : first + len(part)]) == list(range(len(part)))
        assert mine[: len(part)] != sorted(mine[: len(part)])
    for n in range(1, len(rows)):
        assert abs(sum(one in parts[0] for one in ids[:n]) - 0.7 * n) <= 1.5
    again = Ordered(rows, steps=epochs * len(rows), batch_size=1, seed=3)
    assert [tuple(again[i]["input_ids"].tolist()) for i in (len(ids) - 1, 7)] == [ids[-1], ids[7]]
    other = Ordered(rows, steps=len(rows), batch_size=1, seed=4)
    assert ids_of(other) != ids[: len(rows)]


def test_each_source_is_kept_by_itself(spec: DataSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    mixed(spec, tokenizer)
    cache = Path(spec.sources[0].source).parent / "cache"
    before = {path.name for path in cache.iterdir()}
    assert len(before) == 2
    mixed(
        replace(spec, source="stdlib:", sources=tuple(replace(s, weight=1) for s in spec.sources)), tokenizer
    )
    packed(DataSpec(source=spec.sources[0].source), tokenizer, split="all", context_length=4, cache=cache)
    assert {path.name for path in cache.iterdir()} == before


def test_the_fingerprint_is_of_shares_and_contents(spec: DataSpec, tmp_path: Path) -> None:
    def scaled(*weights: float) -> str:
        shares = [replace(s, weight=w) for s, w in zip(spec.sources, weights, strict=True)]
        return open_corpus(replace(spec, source="stdlib:", sources=tuple(shares))).fingerprint()

    first = open_corpus(spec).fingerprint()
    assert first == scaled(0.7, 0.3) == scaled(70, 30)
    assert first != scaled(3, 7)
    write(tmp_path / "b.jsonl", "other", 5)
    assert first != open_corpus(spec).fingerprint()


def test_a_part_of_the_rows_and_validation_keep_the_shares(
    spec: DataSpec, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (a, _), rows = alone(spec, tokenizer), mixed(spec, tokenizer, rows=20)
    assert len(rows) == 20
    ids = ids_of(rows)
    assert sum(one in a for one in ids) == 14
    assert a.index([one for one in ids if one in a][-1]) > len(a) * 0.8
    assert rows.warnings == ()
    held_out = mixed(replace(spec, validation_fraction=0.3), tokenizer, split="validation")
    parts = [
        packed(p, tokenizer, split="validation", context_length=CONTEXT, cache=tmp_path / "cache")
        for p in replace(spec, validation_fraction=0.3).parts()
    ]
    assert len(held_out) == sum(map(len, parts))
    assert all(set(ids_of(part)) & set(ids_of(held_out)) for part in parts)


def test_text_and_dialogues_may_be_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(30)))
    text = write(tmp_path / "a.jsonl", "aa", 30)
    spec = DataSpec(source=f"{text}=1,{chats}=1")
    assert check(spec, "data") == []
    rows = mixed(spec, tokenizer, context_length=32)
    learnt = [int((rows[i]["labels"] != -100).sum()) for i in range(6)]
    assert min(learnt[::2]) > max(learnt[1::2]) > 0
    contents = list(open_corpus(spec).documents("all"))
    assert [isinstance(one, Dialogue) for one in contents] == [False, True] * 30
    faults, notes = foresee(spec, "data", lambda: tokenizer)
    assert faults == []
    assert len(notes) == 2
    assert "data.sources[1]: dialogues, worded with plain" in notes[0]
    sizes = [Path(share.source).stat().st_size for share in spec.sources]
    assert (
        f"{chats} 50.0% of them, by the bytes of files {sum(sizes) / sizes[1] / 2:.2g} times over" in notes[1]
    )


def test_bad_mixtures_are_told_together(spec: DataSpec, tmp_path: Path) -> None:
    a, b = spec.sources
    wrong: list[tuple[DataSpec, tuple[str, ...]]] = [
        (
            DataSpec(sources=(replace(a, weight=0.0), replace(b, weight=-2))),
            ("[0].weight: expected a weight above 0, got 0", "[1].weight: expected a weight above 0, got -2"),
        ),
        (DataSpec(sources=(replace(a, weight=float("nan")), b)), ("a weight above 0, got nan",)),
        (replace(spec, source="x.txt"), ("one source, or several, got source x.txt and 2 sources",)),
        (DataSpec(sources=(a, a)), ("different sources",)),
        (replace(spec, column="text"), ("columns of their own",)),
        (replace(spec, label="text"), ("sentences with classes",)),
        (DataSpec(sources=(a, replace(b, source=str(tmp_path / "c")))), ("sources[1]: ", "no such file")),
        (DataSpec(sources=(replace(a, column="txt"), b)), ("sources[0]: ", "Did you mean: text")),
    ]
    for one, words in wrong:
        text = "\n".join(map(str, check(one, "recipe.yaml:3 data")))
        assert "recipe.yaml:3 data" in text
        for word in words:
            assert word in text
        with pytest.raises(DataError):
            list(open_corpus(one).documents("all"))


def test_an_empty_source_among_several_is_named(
    spec: DataSpec, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.jsonl"
    empty.write_text("")
    short.write_text('{"text": "a"}\n')
    (a, _) = spec.sources
    bad = DataSpec(sources=(a, Share(source=str(empty))))
    (fault,) = check(bad, "data")
    assert "data.sources[1]: " in fault.where
    assert str(empty) in fault.where
    with pytest.raises(DataError, match=r"empty\.jsonl.*an empty source"):
        mixed(bad, tokenizer)
    with pytest.raises(DataError, match=rf"short\.jsonl: expected text for one row of {CONTEXT} tokens"):
        mixed(DataSpec(sources=(a, Share(source=str(short)))), tokenizer)
    with pytest.raises(DataError, match="sentences with classes"):
        examples(spec, tokenizer, context_length=8, cache=tmp_path / "cache")


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_named_weights_survive_the_name(a: int, b: int, digits: int) -> None:
    spec = DataSpec(sources=(Share(source="x", weight=a / 10**digits), Share(source="y", weight=b * 1e6)))
    assert DataSpec(source=spec.source) == spec
