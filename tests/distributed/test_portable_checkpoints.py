"""A checkpoint of one engine goes on under another: the same weights to the bit, the same curve after."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import every_engine_portable
import pytest
import torch
from broken import broken_off_in
from every_engine import NAMES
from every_engine_portable import BEGUN, KEPT, MOVES, STEPS, begin, move, train
from ranks import TOLERANCE, two_ranks
from safetensors.torch import load_file
from tiny import tiny_llama

import compresskit as ck
from compresskit.pipeline import run
from compresskit.planned import Plan
from compresskit.planner import plan
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RAN = {**NAMES, "tp": "tp 2", "one": "single"}
BACK = tuple((engine, "one") for engine in BEGUN)
ALL = (*MOVES, *BACK)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun by one process and by two ranks; gone on with by two ranks, and by one process."""
    pytest.importorskip("deepspeed")
    place = tmp_path_factory.mktemp("portable")
    begin(place, "one")
    with two_ranks(every_engine_portable, place):
        train(place, "unbroken", "one")
    for engine, _ in BACK:
        (place / f"{engine}-one.json").write_text(json.dumps(asdict(move(place, engine, "one"))))
    return place


def outcome(moved: Path, begun: str, engine: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((moved / f"{begun}-{engine}.json").read_text())
    return found


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


@pytest.mark.parametrize(("begun", "engine"), ALL)
def test_the_engine_begins_with_the_very_weights(begun: str, engine: str, moved: Path) -> None:
    kept = load_file(moved / f"{begun}-kept.safetensors")
    began = load_file(moved / f"{begun}-{engine}-began.safetensors")
    assert kept.keys() == began.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, began[name]), name


@pytest.mark.parametrize(("begun", "engine"), ALL)
def test_the_curve_goes_on_as_of_the_unbroken_run(begun: str, engine: str, moved: Path) -> None:
    found, true = losses(moved / f"{begun}-{engine}"), losses(moved / "unbroken")
    assert len(found) == len(true) == STEPS
    assert found == pytest.approx(true, rel=TOLERANCE)
    assert min(true) < 0.97 * true[KEPT], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize(("begun", "engine"), ALL)
def test_what_ran_and_what_is_told(begun: str, engine: str, moved: Path) -> None:
    found = outcome(moved, begun, engine)
    assert (found["engine"], found["processes"]) == (RAN[engine], 1 if engine == "one" else 2)
    assert found["resumed_from"] == KEPT
    (told,) = found["warnings"]
    assert f"went on from step {KEPT} of " in told
    assert ("of one process, on" in told) == (begun == "one")
    assert told.endswith("on one process.") == (engine == "one")


def test_states_that_are_lost_would_be_seen(moved: Path, tmp_path: Path) -> None:
    shutil.copytree(moved / "one", tmp_path / "one")
    path = tmp_path / "one" / "checkpoints" / f"checkpoint-{KEPT}" / "optimizer.pt"
    states = torch.load(path)
    for state in states["state"].values():
        state["exp_avg"].zero_()
    torch.save(states, path)
    train(tmp_path, "one", "one")
    found, true = losses(tmp_path / "one"), losses(moved / "unbroken")
    assert found[: KEPT + 1] == pytest.approx(true[: KEPT + 1], rel=TOLERANCE)
    assert found[KEPT + 1 :] != pytest.approx(true[KEPT + 1 :], rel=50 * TOLERANCE)


def test_a_recipe_goes_on_by_another_strategy(tmp_path: Path) -> None:
    """The same output, started again with other processes: the stage goes on, and the manifest tells it."""
    (tmp_path / "text.txt").write_text("Some text.\n\nAnd some more, that is a little longer.\n\n" * 40)
    tiny_llama(tmp_path / "model")

    def planned(**how: Any) -> Plan:
        stage = ck.Finetune(steps=6, batch_size=4, context_length=32, checkpoint_every=2, **how)
        recipe = ck.Recipe(model=str(tmp_path / "model"), stages=[stage], data=str(tmp_path / "text.txt"))
        return plan(replace(recipe, device="cpu"))

    with broken_off_in(step=6):
        run(planned(), tmp_path / "out")
    made = run(planned(processes=2, strategy="fsdp"), tmp_path / "out")
    (stage,) = made.manifest["stages"]
    metrics, told = stage["result"]["metrics"], stage["result"]["warnings"]
    assert (metrics["engine"], metrics["processes"]) == ("fsdp", 2)
    assert any("went on from step 4 of one process, on fsdp on 2 processes" in text for text in told)
    record = json.loads((tmp_path / "out" / "records" / "1-finetune.record.json").read_text())
    assert record["resumed_from"] == 4
    assert planned().work_key == planned(processes=2, strategy="ddp", workers=1).work_key
    alone = planned(processes=2, strategy="ddp", synchronise="diloco")
    for other in (planned(learning_rate=1e-5), alone):
        assert other.work_key != planned().work_key
    assert alone.work_key != planned(processes=2, synchronise="diloco", outer_learning_rate=0.1).work_key
    assert alone.work_key != planned(processes=4, strategy="ddp", synchronise="diloco").work_key
