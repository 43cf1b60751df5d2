"""A divided teacher under DDP, FSDP2 and ZeRO-1/2/3: the losses of a whole one, in half the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_teachers
import pytest
from completions_server import NAME, serving
from every_engine import ENGINES, NAMES
from every_engine_teachers import RUNS, STEPS, TEACHERS, VOCABULARY, WHOLE, teacher_of, train
from ranks import two_ranks
from tiny import stories, tiny_llama

from compresskit.data.spec import DataSpec
from compresskit.distill.stage import Distill
from compresskit.distill.teacher import Replica
from compresskit.modeling import ModelSource
from compresskit.stage import StageContext
from compresskit.training.run import TrainOutcome
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = {"bf16": 2e-4}
"""Relative, of a loss at any of 10 steps; 2e-5 where none is given: engines sum in other orders."""
CASES = [(run, engine) for run in RUNS for engine in ENGINES]
ODD = 33
"""Of the teacher's vocabulary, hence of its embedding's rows: two ranks cannot divide it evenly."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teachers")
    settings: dict[str, Any] = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    tiny_llama(out / "student", vocab_size=VOCABULARY, **settings)
    tiny_llama(out / "tied", seed=1, vocab_size=VOCABULARY, num_hidden_layers=4, **settings)
    rows = VOCABULARY + ODD  # padding, which the student lacks
    tiny_llama(out / "untied", seed=2, vocab_size=rows, tie_word_embeddings=False, **settings)
    return out


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, TrainOutcome]:
    """One process with the whole teacher, the whole batch at once."""
    return {
        run: train(place, run, place / f"{run}-one-s", teacher_of(place, run, Replica), micro_batch_size=8)
        for run in RUNS
    }


@pytest.fixture(scope="module")
def launched(place: Path, request: pytest.FixtureRequest) -> Path:
    """Two ranks, two rows at a time: each step is 2 ranks x 2 passes x 2 rows; beside them one process."""
    for package in ("deepspeed", "bitsandbytes"):
        pytest.importorskip(package)
    with two_ranks(every_engine_teachers, place):
        request.getfixturevalue("single")
    return place


def said(launched: Path, run: str, engine: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{run}-{engine}-{rank}.json").read_text())
    return found


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_are_those_of_a_whole_teacher(
    run: str, engine: str, launched: Path, single: dict[str, TrainOutcome]
) -> None:
    tolerance = TOLERANCE.get(run, 2e-5)
    logs = [LossLog(launched / f"{run}-{name}-s" / "losses.jsonl") for name in (engine, "one")]
    mine, true = (log.losses() for log in logs)
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=tolerance)
    assert true[-1] < 0.9 * true[0], "nothing was learnt, so nothing was compared"
    outcome = said(launched, run, engine, 0)
    assert (outcome["engine"], outcome["processes"]) == (NAMES[engine], 2)
    assert outcome["validation_loss"] == pytest.approx(single[run].validation_loss, rel=tolerance)
    assert outcome["final_parts"] == pytest.approx(dict(single[run].final_parts), rel=tolerance)


@pytest.mark.parametrize(("run", "engine"), [case for case in CASES if case[0] not in WHOLE])
def test_each_rank_keeps_half_of_the_teacher(run: str, engine: str, launched: Path) -> None:
    whole = ModelSource(launched / TEACHERS[run]).bytes // (2 if run == "bf16" else 1)
    for rank in range(2):
        outcome = said(launched, run, engine, rank)
        assert outcome["teacher_bytes"] == pytest.approx(whole / 2, rel=0.02)
        assert not outcome["learns"]


@pytest.mark.parametrize("placement", ["shard", "server"])
def test_a_stage_with_processes_of_its_own(placement: str, tmp_path: Path) -> None:
    """Through a job as text: weights are read when the workers can talk, and each asks a server."""
    text = tmp_path / "text.txt"
    text.write_text(stories(60))
    teacher = tiny_llama(tmp_path / "teacher", seed=3, initializer_range=0.2)
    student = ModelSource(tiny_llama(tmp_path / "student", initializer_range=0.2))
    few = {"steps": 4, "batch_size": 4, "context_length": 24, "learning_rate": 1e-2, "checkpoint_every": 0}
    found = []
    with serving(teacher) as (url, served):
        there = {"method": "server", "url": url, "model": NAME, "top_k": 8}
        for name, placed, processes in (
            ("one", "replicate", 1),
            ("two", there if placement == "server" else placement, 2),
        ):
            out = tmp_path / name
            for folder in ("out", "scratch"):
                (out / folder).mkdir(parents=True)
            context = StageContext(
                out=out / "out",
                scratch=out / "scratch",
                original=student.directory,
                data=DataSpec(source=str(text)),
                cache=tmp_path / "cache",
                device="cpu",
            )
            stage = Distill(
                teacher=str(teacher),
                teacher_placement=placed,
                loss={"method": "forward_kl", "top_k": 8} if placement == "server" else "forward_kl",
                processes=processes,
                **few,
            )
            found.append(stage.run(student, context).metrics)
        assert [metrics["processes"] for metrics in found] == [1, 2]
        for name in ("first_loss", "final_loss"):
            assert found[1][name] == pytest.approx(found[0][name], rel=2e-5)
        rows = few["steps"] * few["batch_size"]
        assert len(served.prompts) == (rows if placement == "server" else 0), "each row is asked for once"
