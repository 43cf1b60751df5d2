"""Pipelines of two stages: one process's losses and weights, each rank about half of the parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import every_engine_pipeline
import pytest
import torch
from every_engine_pipeline import FOUR, NAMES, RUNS, STEPS, TRUE, make_model, train
from ranks import several_ranks
from safetensors.torch import load_file
from torch import Tensor

from compresskit.training.outcome import TrainOutcome
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 2e-5
"""Relative, of a loss at any of 8 steps: micro-batches are summed one by one, in fp32."""
ROUGH = 2e-3
"""The same where products are rounded to bf16."""


ALL = {**RUNS, **FOUR}
EXACT = [run for run in ALL if run != "bf16"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """One process, the whole batch at once: scratch, outcome and weights."""
    made = {}
    for run in ("untied", *dict.fromkeys(TRUE.values())):
        scratch, saved = tmp_path_factory.mktemp(run), dict[str, Tensor]()
        changes = {"precision": "bf16"} if run == "bf16" else {}
        made[run] = (scratch, train(run, scratch, saved, **changes), saved)
    return made


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Both launches: of two ranks, and of four."""
    out = tmp_path_factory.mktemp("pipeline")
    with several_ranks(every_engine_pipeline, out, 2):
        request.getfixturevalue("single")
    with several_ranks(every_engine_pipeline, out, 4):
        pass
    return out


def true_of(run: str, single: Mapping[str, Any]) -> tuple[Path, TrainOutcome, Mapping[str, Tensor]]:
    found: tuple[Path, TrainOutcome, Mapping[str, Tensor]] = single[TRUE.get(run, "untied")]
    return found


def outcome_of(launched: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{run}.json").read_text())
    return found


@pytest.mark.parametrize("run", ALL)
def test_the_engine_that_ran_is_the_one_asked_for(run: str, launched: Path) -> None:
    found = outcome_of(launched, run)
    assert (found["engine"], found["processes"]) == (NAMES[run], 4 if run in FOUR else 2)


@pytest.mark.parametrize("run", ALL)
def test_losses_are_one_processs_step_by_step(run: str, launched: Path, single: Any) -> None:
    scratch, outcome, _ = true_of(run, single)
    logs = [LossLog(place / "losses.jsonl") for place in (launched / run, scratch)]
    mine, true = (log.losses() for log in logs)
    tolerance = ROUGH if run == "bf16" else TOLERANCE
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=tolerance)
    assert true[-1] < 0.98 * true[0], "nothing was learnt, so nothing was compared"
    norms, expected = ([r["grad_norm"] for r in log.read() if "grad_norm" in r] for log in logs)
    assert norms == pytest.approx(expected, rel=50 * tolerance)
    rates, expected = ([r["learning_rate"] for r in log.read() if "grad_norm" in r] for log in logs)
    assert rates == expected
    found = outcome_of(launched, run)
    assert found["validation_loss"] == pytest.approx(outcome.validation_loss, rel=tolerance)
    assert found["kernels"] == outcome.kernels
    assert found["final_parts"] == pytest.approx(dict(outcome.final_parts), rel=50 * tolerance)
    assert bool(found["final_parts"]) == (run == "taught")


@pytest.mark.parametrize("run", EXACT)
def test_weights_are_one_processs_and_zeros_are_held(run: str, launched: Path, single: Any) -> None:
    saved, (before, held) = (
        load_file(launched / f"{run}.safetensors"),
        make_model(tied=TRUE.get(run) == "tied"),
    )
    _, _, true = true_of(run, single)
    assert saved.keys() == true.keys()
    for name, tensor in true.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for layer in held:
        was = before.get_submodule(layer).weight
        assert not saved[f"{layer}.weight"][was == 0].any(), layer
        assert (saved[f"{layer}.weight"][was != 0] != 0).all(), layer
    if TRUE.get(run) == "tied":
        assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


@pytest.mark.parametrize(("run", "whole"), [("again", "1f1b"), ("side", "side-interleaved")])
def test_a_restart_goes_on(run: str, whole: str, launched: Path) -> None:
    assert outcome_of(launched, run)["resumed_from"] == 3
    mine, true = (LossLog(launched / name / "losses.jsonl").losses() for name in (run, whole))
    assert mine == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("run", ALL)
def test_each_rank_keeps_its_share_of_the_parameters(run: str, launched: Path, single: Any) -> None:
    stages = 4 if run == "tied-four" else 2
    kept = [json.loads((launched / f"{run}-{rank}.json").read_text()) for rank in range(stages)]
    tied = TRUE.get(run) == "tied"
    model, _ = make_model(tied=tied)
    twice = model.lm_head.weight.nbytes if tied else 0  # both ends have it
    assert sum(kept) == true_of(run, single)[1].parameter_bytes + twice
    assert max(kept) < 1.2 * sum(kept) / stages
