"""The table of implementations has every one there is, the specification last."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.kernels import dispatch
from compresskit.kernels.dispatch import OPS, implementation, reference, table

ROOT = Path(dispatch.__file__).parent
RUNS_ON = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
"""Folder of implementations -> device of their tensors."""


@pytest.mark.parametrize("op", OPS)
def test_whatever_is_written_for_an_op_is_in_its_table(op: str) -> None:
    for folder, device in RUNS_ON.items():
        assert (ROOT / folder / f"{op}.py").is_file() is (folder in OPS[op][device]), f"{op} in {folder}/"
    for device in ("cpu", "cuda"):
        assert OPS[op][device][-1] == "reference"


def test_every_file_of_an_implementation_is_of_an_op() -> None:
    sources = {path.stem for folder in RUNS_ON for path in (ROOT / folder).glob("*_linear.*")}
    assert sources
    assert sources <= OPS.keys()


def test_what_was_used_is_told_and_the_table_is_printed() -> None:
    assert implementation("block_linear", "cpu") is reference("block_linear")
    assert dispatch.used()["block_linear"] == "reference"
    assert ["bitmap_linear", "cpu", "cpu, reference"] in [
        row.split(maxsplit=2) for row in table().splitlines()
    ]
