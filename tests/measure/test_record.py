"""Records survive the disk, and nothing that is not a record gets in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compresskit.errors import InputError
from compresskit.measure.record import Record, read_records, spread, write_records


def record(**changes: object) -> Record:
    fields = {
        "kind": "latency",
        "subject": "1-prune",
        "values": {"prefill_ms": 2.0, "load_ms": None},
        "quartiles": {"prefill_ms": (1.0, 2.0, 4.0)},
        "settings": {"prompt_tokens": 128},
        "notes": ("One sentence.",),
        "threads": 2,
        "repetitions": 3,
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    first, second = record(), record(kind="size", quartiles={})
    other = record(subject="a name/with ../ signs")
    paths = write_records([first, other, second], tmp_path / "records")
    assert [p.name for p in paths] == ["1-prune.json", "a_name_with_.._signs.json"]
    back = read_records(paths[0])
    assert [r.kind for r in back] == ["latency", "size"]
    assert json.dumps(back[0].to_json()) == json.dumps(first.to_json())
    assert {"python", "torch", "transformers", "compresskit"} <= set(back[0].versions)
    assert "cores" in back[0].processor


def test_a_single_object_is_a_record_too(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(record().to_json()))
    assert len(read_records(tmp_path / "one.json")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads: expected a whole number of at least 1, got 0"),
        ({"threads": True}, "threads"),
        ({"values": [1]}, "values"),
        ({"quartiles": {"prefill_ms": [1, 2]}}, "quartiles"),
        ({"quartiles": {"prefill_ms": [1, 3.0, 4]}}, r"quartiles.prefill_ms: expected first quartile"),
        ({"quartiles": {"prefill_ms": [4, 2.0, 1]}}, r"quartiles.prefill_ms: expected first quartile"),
        ({"quartiles": {"other_ms": [1, 2, 3]}}, r"quartiles.other_ms"),
        ({"measured_at": "yesterday"}, "measured_at"),
        ({"colour": "red"}, "colour"),
        ({"schema": "compresskit.record/0"}, "compresskit.record/1, got compresskit.record/0"),
    ],
)
def test_each_field_is_checked(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([{**record().to_json(), **change}]))
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / "bad.json")


def test_all_faults_together(tmp_path: Path) -> None:
    data = {**record().to_json(), "threads": 0, "device": ""}
    del data["kind"]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        read_records(tmp_path / "bad.json")
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("text", ["", "[{]", "3", "\udcff"])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=r"bad\.json"):
        read_records(tmp_path / "bad.json")


def test_spread() -> None:
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
