"""Zeros made and moved under one process, DDP, FSDP2 and ZeRO-1/2/3: the same losses, the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_engine_zeros
import pytest
import torch
from every_engine import NAMES
from every_engine_zeros import ALL_FIELDS, BROKEN, ENGINES, RUNS, STEPS, ends, runs_under, train
from ranks import two_ranks
from safetensors.torch import load_file
from tiny import tiny_llama

from compresskit.modeling import ModelSource
from compresskit.sparse.chosen import Chosen
from compresskit.sparse.pattern import parse_pattern
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [(run, engine) for run in RUNS for engine in ENGINES if run in runs_under(engine)]
FROZEN = ("maskllm",)
"""Runs that train no weight: in so few steps the loss of a random model hardly falls by masks alone."""
TOLERANCE = 1e-5
"""Relative, of a loss: engines sum gradients in other orders, in fp32."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zeros")
    tiny_llama(out / "model", vocab_size=48, hidden_size=16, intermediate_size=32)
    return out


@pytest.fixture(scope="module")
def launched(place: Path) -> Path:
    """Two ranks, two rows at a time; beside them, one process with the whole batch at once."""
    pytest.importorskip("deepspeed")
    with two_ranks(every_engine_zeros, place):
        for run in RUNS:
            fields = replace(ALL_FIELDS, micro_batch_size=8)
            train(run, ModelSource(place / "model"), place / f"{run}-one", fields)
    return place


def losses(out: Path) -> list[float]:
    return LossLog(out.with_name(f"{out.name}-s") / "losses.jsonl").losses()


def outcome(launched: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_engine_that_ran_is_the_one_asked_for(run: str, engine: str, launched: Path) -> None:
    found = outcome(launched, f"{run}-{engine}")
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_agree_step_by_step(run: str, engine: str, launched: Path) -> None:
    mine, true = (losses(launched / f"{run}-{name}") for name in (engine, "one"))
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=TOLERANCE)
    if run not in FROZEN:
        assert min(true) < 0.97 * true[0], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize("run", FROZEN)
def test_masks_have_left_the_ones_they_started_with(run: str, launched: Path, tmp_path: Path) -> None:
    made, source = load_file(launched / f"{run}-one" / "model.safetensors"), ModelSource(launched / "model")
    begun = Chosen(method=run, options=RUNS[run]["options"], ends=ends(run, source), steps=STEPS)
    begun.save(source, tmp_path, begun.load(source).state_dict())
    start = load_file(tmp_path / "model.safetensors")
    layers = [f"{layer}.weight" for layer in ends(run, source)]
    left = sum(int(((made[name] == 0) != (start[name] == 0)).sum()) for name in layers)
    assert left > 0.1 * sum(made[name].numel() for name in layers)
    for name, tensor in made.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], source.tensor(name)[kept]), name


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_saved_zeros_are_those_asked_for(run: str, engine: str, launched: Path) -> None:
    """To the weight: as many as the pattern says, in its groups, and the same ones as in one process."""
    mine, true = (load_file(launched / f"{run}-{n}" / "model.safetensors") for n in (engine, "one"))
    assert mine.keys() == true.keys()
    for layer, end in ends(run, ModelSource(launched / "model")).items():
        now, pattern = mine[f"{layer}.weight"], parse_pattern(end)
        assert pattern.missing(now == 0) == (), layer
        assert int((now == 0).sum()) == round(pattern.zero_fraction * now.numel()), layer
        assert torch.equal(now == 0, true[f"{layer}.weight"] == 0), layer
    for name, tensor in true.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("run", "engine"), [case for case in CASES if case[0] in BROKEN])
def test_a_restart_changes_no_byte(run: str, engine: str, launched: Path) -> None:
    """Which weights are zero, and which are to change next, is in the checkpoint's weights and step."""
    assert outcome(launched, f"{run}-broken-{engine}")["resumed_from"] == 5
    one, two = (launched / f"{name}-{engine}" / "model.safetensors" for name in (run, f"{run}-broken"))
    assert one.read_bytes() == two.read_bytes()
