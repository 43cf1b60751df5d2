"""Batches that grow with the noise of gradients: two ranks measure, and grow, as one process does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import every_engine_noise
import pytest
import torch
from every_engine_noise import BREAK, GREW, GROWING, RUNS, STEPS, train
from ranks import assert_losses_agree, two_ranks
from safetensors.torch import load_file
from torch import Tensor

from compresskit.training.outcome import TrainOutcome
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Single = tuple[TrainOutcome, tuple[str, ...], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Single]:
    """Both engines on two ranks, and one process with as many passes."""
    out, saved = tmp_path_factory.mktemp("noise"), dict[str, Tensor]()
    with two_ranks(every_engine_noise, out):
        outcome, held = train(out, "plain", out / "plain-one-s", saved)
    return out, (outcome, held, saved)


def scales(scratch: Path) -> list[float | None]:
    return [r["noise_scale_rows"] for r in LossLog(scratch / "losses.jsonl").read() if "batch_size" in r]


@pytest.mark.parametrize("engine", GROWING)
def test_ranks_grow_as_one_process_does(engine: str, launched: tuple[Path, Single]) -> None:
    out, (single, held, saved) = launched
    assert_losses_agree(out, "plain", engine, single)
    outcome = json.loads((out / f"plain-{engine}.json").read_text())
    assert outcome["batch_sizes"] == single.batch_sizes == GREW
    found, expected = scales(out / f"plain-{engine}-s"), scales(out / "plain-one-s")
    assert [f is None for f in found] == [e is None for e in expected]
    told = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    assert len(told) > 3, "nothing to compare"
    # Near its bound a quotient of what nearly cancels; of the first step the engines' sums alone.
    assert told[0][0] == pytest.approx(told[0][1], rel=1e-4)
    assert [1 / f for f, _ in told] == pytest.approx([1 / e for _, e in told], rel=1e-2, abs=1e-5)
    mine = load_file(out / f"plain-{engine}.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
        if name.removesuffix(".weight") in held:
            assert torch.equal(mine[name] == 0, tensor == 0), name
            assert 0.4 < (tensor == 0).float().mean() < 0.6


@pytest.mark.parametrize("engine", GROWING)
def test_a_restart_gives_the_same_bytes(engine: str, launched: tuple[Path, Single]) -> None:
    out, _ = launched
    again, straight = ({**_outcome(out, run, engine), "seconds": 0} for run in reversed(RUNS))
    assert (again.pop("resumed_from"), straight.pop("resumed_from")) == (BREAK - 1, 0)
    assert again["steps"] == STEPS
    assert again == straight
    mine, true = (load_file(out / f"{run}-{engine}.safetensors") for run in reversed(RUNS))
    assert all(torch.equal(mine[name], true[name]) for name in true)


def _outcome(out: Path, run: str, engine: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{run}-{engine}.json").read_text())
    return found
