"""Memory that runs out on one of two ranks: both take fewer rows a pass, and the steps stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_backoff
import pytest
from every_engine_backoff import RUNS, STEPS, train
from ranks import two_ranks

from compresskit.training.outcome import TrainOutcome
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, TrainOutcome]]:
    """Two ranks, and one process that never runs short."""
    out = tmp_path_factory.mktemp("backoff")
    with two_ranks(every_engine_backoff, out):
        single = {
            run: train(run, out / f"{run}-one", scarce=False, adapt_batch="none", strategy="auto")
            for run in ("never", "fp16")
        }
    return out, single


@pytest.mark.parametrize("run", RUNS)
def test_both_ranks_do_the_same(run: str, launched: tuple[Path, dict[str, Any]]) -> None:
    out, single = launched
    ranks = [json.loads((out / f"{run}-{rank}.json").read_text()) for rank in range(2)]
    rows = 4 if run == "never" else 2
    assert [found["micro_batch_size"] for found in ranks] == [rows, rows]
    assert [found["engine"] for found in ranks] == ["ddp", "ddp"]
    assert ranks[0]["warnings"] == ranks[1]["warnings"]
    told = [] if run == "never" else ["Memory ran out in step 3 with 4 rows a pass"]
    assert [warning.partition(":")[0] for warning in ranks[0]["warnings"]] == told
    true = "fp16" if run == "fp16" else "never"
    mine, expected = (LossLog(out / n / "losses.jsonl").losses() for n in (run, f"{true}-one"))
    assert len(mine) == STEPS
    assert mine == pytest.approx(expected, rel=1e-3 if run == "fp16" else 1e-5)
    loss = single[true].validation_loss
    assert ranks[0]["validation_loss"] == pytest.approx(loss, rel=1e-3 if run == "fp16" else 1e-5)
