"""The table of kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compresskit.cli import main
from compresskit.errors import InputError
from compresskit.measure import Record, kernels

ROW: dict[str, Any] = {
    "shape": "4096x4096",
    "zeros": "0.5",
    "tokens": 1,
    "candidate": "bitmap bf16",
    "ms": [0.9, 1.0, 1.25],
    "bytes": 1000,
    "GB_per_s": 12.3,
    "ratio": 1.6,
    "over_torch_bf16": 2.25,
    "over_torch_int8": None,
    "limit": 1.777,
    "limit_fraction": 0.9,
}


def write(path: Path, rows: list[dict[str, Any]], when: str, kind: str = kernels.KIND) -> Path:
    record = Record(kind=kind, subject="layers", values={"rows": rows}, measured_at=when)
    path.write_text(json.dumps([record.to_json()]))
    return path


def test_the_newest_record_is_printed(tmp_path: Path) -> None:
    old = write(tmp_path / "b.json", [ROW], "2029-01-01T00:00:00Z")
    new = write(tmp_path / "a.json", [ROW, {**ROW, "zeros": "2:4", "limit": None, "limit_fraction": None}],
                "2030-01-01T00:00:00Z")  # fmt: skip
    done = CliRunner().invoke(main, ["bench", "kernels", str(old), str(new)])
    assert done.exit_code == 0, done.output
    where, headings, first, second = done.output.splitlines()
    assert "2030-01-01" in where
    assert headings.split()[:4] == ["shape", "zeros", "batch", "candidate"]
    assert " ".join(first.split()) == (
        "4096x4096 50% 1 bitmap bf16 1.000 0.900 to 1.250 12.3 1.60 2.25 - 1.78 90%"
    )
    assert second.split()[1] == "2:4"
    assert second.split()[-2:] == ["-", "-"]


def test_of_larger_batches_the_bytes_of_a_weight_are_no_limit() -> None:
    one, four = (kernels.table([{**ROW, "tokens": tokens}]).splitlines()[1].split() for tokens in (1, 4))
    assert one[-2:] == ["1.78", "90%"]
    assert four[-2:] == ["-", "-"], "records of older days say numbers there"
    assert len(one) == len(four)


def test_all_records_of_the_newest_day_are_printed_in_their_order(tmp_path: Path) -> None:
    later = write(tmp_path / "a.json", [{**ROW, "shape": "2x2"}], "2030-01-01T09:00:00Z")
    sooner = write(tmp_path / "b.json", [{**ROW, "shape": "1x1"}], "2030-01-01T08:00:00Z")
    told = kernels.recorded([later, sooner])
    assert told.index("1x1") < told.index("2x2")


def test_no_record_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(tmp_path / "c.json", [ROW], "2030-01-01T00:00:00Z", kind="kernels-gpu")
    with pytest.raises(InputError, match="expected a record of kind kernels-cpu"):
        kernels.recorded([other])
    monkeypatch.setattr(kernels, "PROJECT", tmp_path)
    with pytest.raises(InputError, match="expected a record of kind kernels-cpu, got none in"):
        kernels.recorded()
    with pytest.raises(InputError, match="expected the project's benchmarks"):
        kernels.run()
