"""Two ranks, one of them slower: it has fewer rows of each step, and the steps are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_shares
import pytest
from every_engine_shares import BATCH, BREAK, CHECKPOINT, RUNS, STEPS, train
from ranks import TOLERANCE, two_ranks

from compresskit.training.outcome import TrainOutcome
from compresskit.training.shares import STATE
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROWS, MICRO = BATCH["batch_size"], BATCH["micro_batch_size"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainOutcome]:
    """Both ranks, and one process."""
    out = tmp_path_factory.mktemp("shares")
    with two_ranks(every_engine_shares, out):
        single = train("one", out / "one", [], sleep_s=0.0)
    return out, single


@pytest.mark.parametrize("run", RUNS)
def test_the_slower_rank_has_fewer_rows_of_the_same_steps(
    run: str, launched: tuple[Path, TrainOutcome]
) -> None:
    out, single = launched
    ranks: list[dict[str, Any]] = [json.loads((out / f"{run}-{rank}.json").read_text()) for rank in range(2)]
    assert [found["engine"] for found in ranks] == ["ddp", "ddp"]
    shares = ranks[0]["shares"]
    assert shares == ranks[1]["shares"]
    assert sum(shares) == ROWS
    assert shares[0] > shares[1]
    mine, expected = (LossLog(out / n / "losses.jsonl").losses() for n in (run, "one"))
    assert len(mine) == STEPS
    assert mine == pytest.approx(expected, rel=TOLERANCE)
    assert ranks[0]["validation_loss"] == pytest.approx(single.validation_loss, rel=TOLERANCE)


def test_no_pass_is_larger_than_asked_for_and_no_row_is_lost(launched: tuple[Path, TrainOutcome]) -> None:
    out, _ = launched
    ranks = [json.loads((out / f"plain-{rank}.json").read_text()) for rank in range(2)]
    seen = [found["seen"] for found in ranks]
    assert max(map(max, seen)) == MICRO
    assert len(seen[0]) == len(seen[1])
    assert sum(map(sum, seen)) == STEPS * ROWS
    last = [sum(own[-len(own) // STEPS :]) for own in seen]
    assert last[0] > last[1]


def test_a_restart_keeps_the_shares(launched: tuple[Path, TrainOutcome]) -> None:
    """Its steps are too few to measure anew."""
    out, _ = launched
    found = json.loads((out / "broken-0.json").read_text())
    assert found["resumed_from"] == CHECKPOINT < BREAK
    kept = json.loads((out / "broken" / "checkpoints" / f"checkpoint-{CHECKPOINT}" / STATE).read_text())
    assert kept["first"] <= CHECKPOINT
    assert found["shares"] == kept["rows"]
    ended = json.loads((out / "ended-0.json").read_text())
    assert ended["resumed_from"] == STEPS, "there was nothing left to do"
    assert ended["shares"] == kept["rows"]
