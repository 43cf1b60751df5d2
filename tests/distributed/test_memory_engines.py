"""Each way of keeping activations under DDP, FSDP2 and ZeRO: the losses of keeping all of them."""

from __future__ import annotations

import json
from pathlib import Path

import every_engine_memory
import pytest
from every_engine import NAMES
from every_engine_memory import CASES, STEPS
from ranks import two_ranks

from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("memory")
    with two_ranks(every_engine_memory, out):
        pass
    return out


def steps(launched: Path, name: str) -> list[tuple[float, float]]:
    records = LossLog(launched / f"{name}-s" / "losses.jsonl").read()
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.mark.parametrize(("mode", "engine"), [case for case in CASES if case[0] != "none"])
def test_nothing_changes(mode: str, engine: str, launched: Path) -> None:
    """To the last digit: what is computed again is computed alike."""
    mine, true = (steps(launched, f"{name}-{engine}") for name in (mode, "none"))
    assert len(mine) == STEPS
    assert mine == true
    found = json.loads((launched / f"{mode}-{engine}.json").read_text())
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)
