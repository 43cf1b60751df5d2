"""ZenFlow under DeepSpeed: most columns stand still between late updates, and all is as its paper has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_zenflow
import pytest
import torch
from every_engine_zenflow import EVERY, RUNS, STEPS, Slow, make_model
from ranks import two_ranks
from safetensors.torch import load_file

from compresskit.training.rules import zenflow
from compresskit.training.rules.zenflow import span
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LATE = [run for run in RUNS if run != "plain"]
NAME = f"deepspeed ZeRO-2, zenflow every {EVERY}"
TOLERANCE = 2e-5
"""Relative, of a loss at any of 19 steps: DeepSpeed's Adam on the CPU fuses what torch rounds in between."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    if zenflow._unknown() or not zenflow._compiles():
        pytest.skip("another deepspeed than the one that is mended, or nothing to compile its Adam with")
    out = tmp_path_factory.mktemp("zenflow")
    with two_ranks(every_engine_zenflow, out):
        pass
    return out


def losses(launched: Path, run: str) -> list[float]:
    return LossLog(launched / run / "losses.jsonl").losses()


def read(launched: Path, name: str) -> Any:
    return json.loads((launched / f"{name}.json").read_text())


@pytest.mark.parametrize("run", RUNS)
def test_the_engine_is_named_with_its_late_updates(run: str, launched: Path) -> None:
    found = read(launched, run)
    assert (found["engine"], found["processes"]) == (NAME if run in LATE else "deepspeed ZeRO-2", 2)


def test_only_chosen_columns_move_between_late_updates(launched: Path) -> None:
    told = read(launched, "zenflow-0")
    assert len(told) == STEPS
    for step, found in enumerate(told, 1):
        for name, changed in found["changed"].items():
            if step == 1:  # a learning rate of 0, the first of the warm-up
                assert changed == [], name
            elif step % EVERY and step < STEPS:
                assert changed == found["chosen"][name], (step, name)
            else:
                assert len(changed) > 2 * len(found["chosen"][name]), (step, name)
    assert told[span(EVERY) - 1]["chosen"] == told[0]["chosen"]


@pytest.mark.parametrize("run", LATE)
def test_both_ranks_have_the_same_weights_after_each_step(run: str, launched: Path) -> None:
    one, other = (read(launched, f"{run}-{rank}") for rank in (0, 1))
    assert [found["digest"] for found in one] == [found["digest"] for found in other]
    assert len({found["digest"] for found in one}) > 1


def test_losses_and_weights_are_those_of_the_papers_steps(launched: Path) -> None:
    slow = Slow([found["chosen"] for found in read(launched, "zenflow-0")])
    slow.train()
    assert losses(launched, "zenflow") == pytest.approx(slow.losses, rel=TOLERANCE)
    assert min(slow.contrasts) > 1
    saved = load_file(launched / "zenflow.safetensors")
    for name, tensor in slow.now().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("run", LATE)
def test_it_learns_though_later_than_without(run: str, launched: Path) -> None:
    mine, plain = losses(launched, run), losses(launched, "plain")
    assert mine[0] == pytest.approx(plain[0], rel=1e-6 if run != "bf16" else 1e-2)
    assert mine[-1] < 0.97 * mine[0]
    assert mine[-1] < plain[-1] + 0.75 * (plain[0] - plain[-1])


@pytest.mark.parametrize("run", LATE)
def test_every_pruned_weight_is_zero_in_the_saved_result(run: str, launched: Path) -> None:
    saved, (before, held) = load_file(launched / f"{run}.safetensors"), make_model()
    for layer in held:
        was = before.get_submodule(layer).weight
        assert not saved[f"{layer}.weight"][was == 0].any(), layer
        assert (saved[f"{layer}.weight"] != was)[was != 0].any(), layer


def test_a_restart_behind_the_last_step_tells_of_the_late_updates_before_it(launched: Path) -> None:
    found = read(launched, "ended-0")
    assert (found["resumed_from"], found["engine"]) == (STEPS, NAME)


def test_a_restart_goes_on_exactly(launched: Path) -> None:
    """From where no update is owed, with the columns that are chosen there."""
    found = read(launched, "again")
    assert found["resumed_from"] == span(EVERY)
    assert losses(launched, "again") == losses(launched, "zenflow")
    assert found["validation_loss"] == read(launched, "zenflow")["validation_loss"]
    one, other = (load_file(launched / f"{run}.safetensors") for run in ("again", "zenflow"))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=0, msg=name)
