"""Each optimiser under the engines that the table says it is for: the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path

import every_engine_optimizers
import pytest
import torch
from every_engine import NAMES
from every_engine_optimizers import CASES, train
from ranks import two_ranks

from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 2e-5
"""Relative, of a loss at any of 8 steps: engines sum gradients in other orders, in fp32."""
OTHERWISE = {("adafactor", engine): 0.05 for engine in ("zero2", "zero3")}
"""ZeRO lays parameters flat, of which Adafactor keeps every second moment and one clipping for all."""
OTHERWISE |= {("lion", "ddp"): 0.02, ("lion_8bit", "ddp"): 0.02}
"""A sign turns with the last digit of a gradient that is nearly zero."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two rows at a time; beside them one process with the whole batch at once."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("optimizers")
    with two_ranks(every_engine_optimizers, out), torch.compiler.set_stance("force_eager"):
        for name in sorted({name for name, _ in CASES}):
            train(name, out / f"{name}-one-s", micro_batch_size=8)
    return out


def losses(out: Path, name: str) -> list[float]:
    return LossLog(out / f"{name}-s" / "losses.jsonl").losses()


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_losses_agree_step_by_step(name: str, engine: str, launched: Path) -> None:
    mine, true = (losses(launched, f"{name}-{where}") for where in (engine, "one"))
    assert len(mine) == every_engine_optimizers.STEPS
    assert mine == pytest.approx(true, rel=OTHERWISE.get((name, engine), TOLERANCE))
    assert mine[-1] < 0.98 * mine[0]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_the_engine_that_ran_is_the_one_asked_for(name: str, engine: str, launched: Path) -> None:
    found = json.loads((launched / f"{name}-{engine}.json").read_text())
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)
