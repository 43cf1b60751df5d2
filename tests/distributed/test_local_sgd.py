"""Ranks that step alone: exchanges as the papers have them, nothing said in between, zeros held, restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_alone
import pytest
import torch
from every_engine_alone import AGAIN, EVERY, NAMES, RUNS, STEPS, Slow, make_model
from ranks import two_ranks
from safetensors.torch import load_file

from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 2e-5
"""Relative, of a loss at any of 10 steps: ranks sum in other orders than one process does, in fp32."""
ALONE = [run for run in RUNS if run not in ("sgd-ddp", "post")]
AGREEING = ("local", "post", "diloco", "late")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    with two_ranks(every_engine_alone, out):
        pass
    return out


def losses(launched: Path, run: str) -> list[float]:
    return LossLog(launched / run / "losses.jsonl").losses()


def outcome_of(launched: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{run}.json").read_text())
    return found


@pytest.mark.parametrize("run", RUNS)
def test_the_engine_is_named_with_its_exchanges(run: str, launched: Path) -> None:
    found = outcome_of(launched, run)
    assert (found["engine"], found["processes"]) == (NAMES[run], 2)


def test_an_exchange_after_each_plain_step_is_ddp(launched: Path) -> None:
    """The mean of weights one SGD step apart is a step along the mean of the gradients."""
    mine, true = losses(launched, "sgd-alone"), losses(launched, "sgd-ddp")
    assert mine == pytest.approx(true, rel=TOLERANCE)
    assert len(true) == STEPS
    assert true[-1] < 0.99 * true[0], "nothing was learnt, so nothing was compared"
    found, expected = (load_file(launched / f"{run}.safetensors") for run in ("sgd-alone", "sgd-ddp"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("run", AGREEING)
def test_losses_and_weights_are_those_of_the_papers_steps(run: str, launched: Path) -> None:
    slow = Slow(run)
    slow.train()
    assert losses(launched, run) == pytest.approx(slow.losses, rel=TOLERANCE)
    saved = load_file(launched / f"{run}.safetensors")
    for name, tensor in slow.outer.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("run", ALONE)
def test_nothing_is_said_between_exchanges(run: str, launched: Path) -> None:
    """Collectives that had begun before a step's end, counted by the process group, DDP's own among them."""
    begun = json.loads((launched / f"{run}-0.json").read_text())[-STEPS:]
    every = 1 if run == "sgd-alone" else EVERY
    told = {after: begun[after] - begun[after - 1] for after in range(1, STEPS)}  # step `after` + 1, less one
    quiet = {after for after, count in told.items() if not count}
    late = {"late": 2}.get(run, 0)
    # An exchange is begun after a step, and its losses are told once it has arrived.
    speaking = {s for s in range(1, STEPS) if s % every == 0}
    speaking |= {s + late for s in speaking if s + late < STEPS} if late else set()
    speaking |= {s for s in range(1, STEPS) if s % (RUNS[run].get("eval_every") or STEPS) == 0}
    assert set(told) - quiet == speaking
    if run in ("sgd-alone", "diloco"):
        assert {told[s] for s in speaking} == {2}, "weights in one sum, losses in another"


@pytest.mark.parametrize("run", [*AGREEING, *AGAIN])
def test_every_pruned_weight_is_zero_in_the_saved_result(run: str, launched: Path) -> None:
    saved, (before, held) = load_file(launched / f"{run}.safetensors"), make_model()
    for layer in held:
        was = before.get_submodule(layer).weight
        assert not saved[f"{layer}.weight"][was == 0].any(), layer
        assert (saved[f"{layer}.weight"][was != 0] != 0).all(), layer


@pytest.mark.parametrize("run", AGAIN)
def test_a_restart_behind_the_last_step_tells_of_the_exchanges_before_it(run: str, launched: Path) -> None:
    found = outcome_of(launched, f"{run}-ended-0")
    assert found["resumed_from"] == STEPS
    assert found["engine"] == NAMES[run.removesuffix("-again")]


@pytest.mark.parametrize("run", AGAIN)
def test_a_restart_goes_on_exactly(run: str, launched: Path) -> None:
    """Also with weights that differ between ranks, and with an exchange under way."""
    whole, found = run.removesuffix("-again"), outcome_of(launched, run)
    assert found["resumed_from"] == {"local-again": 6, "late-again": 5}[run]
    assert losses(launched, run) == losses(launched, whole)
    assert found["validation_loss"] == outcome_of(launched, whole)["validation_loss"]
    one, other = (load_file(launched / f"{name}.safetensors") for name in (run, whole))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=0, msg=name)
