"""One recipe under one process, DDP, FSDP2 and ZeRO-1/2/3: the same losses, the same zeros."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import every_engine
import pytest
import torch
from every_engine import (
    BEST,
    ENGINES,
    EVALUATED,
    FIELDS,
    INT8,
    NAMES,
    SCALE,
    STEPS,
    Counting,
    make_model,
)
from ranks import two_ranks
from safetensors.torch import load_file
from torch import Tensor

from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NEEDS_TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
TOLERANCE = 2e-6
"""Relative, of a loss at any of 20 steps: engines sum gradients in other orders, in fp32."""


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainOutcome, Mapping[str, Tensor]]:
    """One process, the whole batch at once."""
    scratch = tmp_path_factory.mktemp("single")
    saved: dict[str, Tensor] = {}
    model, held = make_model()
    outcome = Run(
        model,
        Counting(),
        fields=replace(FIELDS, micro_batch_size=8),
        scratch=scratch,
        validation=Counting(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()
    return scratch, outcome, saved


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Two ranks, two rows at a time: each step is 2 ranks x 2 passes x 2 rows; beside them one process."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("launched")
    with two_ranks(every_engine, out):
        request.getfixturevalue("single")
    return out


def outcome_of(launched: Path, engine: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{engine}.json").read_text())
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_agree_step_by_step(engine: str, launched: Path, single: Any) -> None:
    scratch, outcome, _ = single
    mine, true = losses(launched / engine), losses(scratch)
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=TOLERANCE)
    assert true[-1] < 0.9 * true[0], "nothing was learnt, so nothing was compared"
    assert outcome_of(launched, engine)["validation_loss"] == pytest.approx(outcome.validation_loss, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_that_ran_is_the_one_asked_for(engine: str, launched: Path) -> None:
    found = outcome_of(launched, engine)
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_pruned_weight_is_zero_in_the_saved_result(engine: str, launched: Path, single: Any) -> None:
    saved, (before, held) = load_file(launched / f"{engine}.safetensors"), make_model()
    for layer in held:
        was = before.get_submodule(layer).weight
        assert not saved[f"{layer}.weight"][was == 0].any(), layer
        assert (saved[f"{layer}.weight"][was != 0] != 0).all(), layer
    _, _, true = single
    assert saved.keys() == true.keys()
    for name, tensor in true.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_ranks_that_would_write_to_directories_of_their_own_are_refused(launched: Path) -> None:
    for rank in (0, 1):
        told = (launched / f"apart-{rank}.txt").read_text()
        assert "training: scratch: expected" in told
        assert "on rank 1" in told


@pytest.mark.parametrize("run", BEST)
def test_the_best_evaluation_is_kept(run: str, launched: Path, tmp_path: Path) -> None:
    """Rows that count by another number are predicted worse the longer training lasts."""
    saved: dict[str, Tensor] = {}
    model, held = make_model()
    fields = replace(FIELDS, micro_batch_size=8, **EVALUATED)
    true = Run(
        model,
        Counting(),
        fields=fields,
        scratch=tmp_path,
        validation=Counting(7),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()
    assert 0 < true.given_step < STEPS
    found, mine = outcome_of(launched, run), load_file(launched / f"{run}.safetensors")
    assert (found["engine"], found["given_step"]) == (NAMES[run.removeprefix("best-")], true.given_step)
    assert found["validation_loss"] == pytest.approx(true.validation_loss, rel=1e-4)
    for name, tensor in saved.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@NEEDS_TORCHAO
@pytest.mark.parametrize("run", INT8)
def test_products_in_int8_stay_near_and_keep_zeros(run: str, launched: Path, single: Any) -> None:
    """Where they were not multiplied in int8, losses would be those of the float run to six digits."""
    mine, true = losses(launched / run), losses(single[0])
    assert mine == pytest.approx(true, rel=1e-3)
    assert mine != pytest.approx(true, rel=TOLERANCE)
    assert mine == pytest.approx(losses(launched / "int8-ddp"), rel=1e-4)
    assert outcome_of(launched, run)["engine"] == run.removeprefix("int8-")
    saved, (before, held) = load_file(launched / f"{run}.safetensors"), make_model()
    assert saved.keys() == single[2].keys()
    for layer in held:
        was = before.get_submodule(layer).weight
        assert not saved[f"{layer}.weight"][was == 0].any(), layer
        assert (saved[f"{layer}.weight"][was != 0] != 0).all(), layer


@pytest.mark.parametrize("engine", ENGINES)
def test_parameter_bytes_per_rank(engine: str, launched: Path, single: Any) -> None:
    _, outcome, _ = single
    share = outcome_of(launched, engine)["parameter_bytes"] / outcome.parameter_bytes
    if engine in ("fsdp", "zero3"):
        assert share == pytest.approx(0.5, abs=0.02)
    else:
        assert share == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_ranks_compute_in_few_bits_and_skip_the_same_steps(
    precision: str, launched: Path, single: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss scale that overflows fp16 is halved, and the step skipped, until gradients fit.

    Gradients of two ranks are twice as large until DDP takes their mean.
    """
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2 * SCALE))
    fields = replace(FIELDS, micro_batch_size=8, precision=precision)
    model, held = make_model()
    true = Run(model, Counting(), fields=fields, scratch=tmp_path, held=held, device="cpu").train()
    found = outcome_of(launched, precision)
    assert (found["engine"], found["processes"]) == ("ddp", 2)
    assert found["skipped_steps"] == true.skipped_steps
    assert (true.skipped_steps > 0) == (precision == "fp16")
    mine = losses(launched / precision)
    assert mine == pytest.approx(losses(tmp_path), rel=0.02)
    assert mine != losses(single[0]), "the precision had no effect"
    saved = load_file(launched / f"{precision}.safetensors")
    assert not any(
        saved[f"{layer}.weight"][make_model()[0].get_submodule(layer).weight == 0].any() for layer in held
    )


def test_rows_that_are_read_ahead_are_the_same(launched: Path) -> None:
    found = outcome_of(launched, "read-ahead")
    assert (found["engine"], found["processes"]) == ("ddp", 2)
    assert losses(launched / "read-ahead") == losses(launched / "ddp")
    assert len((launched / "read-ahead.txt").read_text().split()) >= STEPS * FIELDS.batch_size
