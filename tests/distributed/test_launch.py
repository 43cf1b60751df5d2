"""Training processes that this machine starts: they share one job, fail as one, and continue after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import stories, tiny_llama
from torch import Tensor

from compresskit.data.spec import DataSpec
from compresskit.errors import CheckpointError, NumericError, RunError, WorkerError
from compresskit.training.fields import TrainingFields
from compresskit.training.job import Part, TrainJob, train
from compresskit.training.launch import failure_of, is_worth_a_restart, note_failure
from compresskit.training.objective import Head, Signal
from compresskit.training.outcome import outcome_from_json
from compresskit.training.setting import NOTES
from compresskit.training.watch import LossLog

HERE = Path(__file__)
FIELDS = TrainingFields(steps=12, batch_size=4, learning_rate=1e-3, checkpoint_every=3, context_length=24)


@dataclass(frozen=True)
class FailsOnRankOne:
    """An objective that breaks on one rank only, while the other waits in a collective."""

    how: str
    needs_teacher: ClassVar[bool] = False

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        if os.environ["RANK"] == "1" and self.how == "raise":
            raise ZeroDivisionError("rank one gave up")
        loss = (hidden_BTD[:, :1] @ head.weight_VD.T).sum()
        return {"loss": loss * float("nan") if os.environ["RANK"] == "1" else loss}


@pytest.fixture
def job(tmp_path: Path, token_cache: Path) -> TrainJob:
    text = tmp_path / "text.txt"
    text.write_text(stories())
    (tmp_path / "out").mkdir()
    return TrainJob(
        model=str(tiny_llama(tmp_path / "model", num_hidden_layers=1)),
        out=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        fields=asdict(FIELDS),
        objective=Part("compresskit.training.objective:CrossEntropy"),
        data=asdict(DataSpec(source=str(text))),
        context_length=24,
        cache=str(token_cache),
        validation_rows=8,
        device="cpu",
    )


def with_fields(job: TrainJob, **changes: Any) -> TrainJob:
    return replace(job, fields=asdict(replace(job.training, **changes)))


def test_a_job_survives_json(job: TrainJob) -> None:
    assert TrainJob.from_json(job.to_json()) == job
    job = replace(
        job, teacher=Part("a:B", {"c": 1}), adaptation=Part("d:E"), zeroing=Part("f:G"), held=("x", "y")
    )
    assert TrainJob.from_json(job.to_json()) == job


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed ZeRO-3"])
def test_sharded_it_distils_from_a_replica_as_one_process_does(
    engine: str, job: TrainJob, tmp_path: Path
) -> None:
    """Untied, in bf16 weights: what is saved has the model's own dtype and loads as the model did."""
    student = tiny_llama(
        tmp_path / "student", seed=1, dtype=torch.bfloat16, num_hidden_layers=1, tie_word_embeddings=False
    )
    teacher = Part("compresskit.distill.teacher:Replica", {"directory": job.model, "vocabulary": 258})
    job = replace(
        with_fields(job, checkpoint_every=0, steps=6),
        model=str(student),
        teacher=teacher,
        objective=Part("compresskit.distill.divergences:Divergences", {"temperature": 2.0}),
    )
    (tmp_path / "one").mkdir()
    one = train(replace(job, out=str(tmp_path / "one"), scratch=str(tmp_path / "one_scratch")))
    strategy = engine.partition(" ")[0]
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
    two = train(with_fields(job, processes=2, strategy=strategy, zero_stage=3))
    assert (one.engine, two.engine, two.processes) == ("single", engine, 2)
    mine, true = (LossLog(Path(p) / "losses.jsonl").losses() for p in (job.scratch, tmp_path / "one_scratch"))
    assert mine == pytest.approx(true, rel=1e-5)
    saved = load_file(Path(job.out) / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert saved.keys() == load_file(student / "model.safetensors").keys()
    assert (Path(job.out) / "tokenizer.json").is_file()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "nan"])
def test_the_first_failure_is_told_and_no_process_stays(job: TrainJob, how: str) -> None:
    """The other rank would wait in a collective for half an hour."""
    failing = Part("test_launch:FailsOnRankOne", {"how": how})
    job = replace(with_fields(job, processes=2), objective=failing)
    environment = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), environment])
    started = time.monotonic()
    try:
        if how == "raise":
            with pytest.raises(WorkerError, match=r"process 1 of 2 failed(.|\n)*rank one gave up"):
                train(job)
        else:
            with pytest.raises(NumericError, match="step 1"):
                train(job)
    finally:
        os.environ["PYTHONPATH"] = environment
    assert time.monotonic() - started < 120


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    error = failure_of(tmp_path, [(0, -signal.SIGTERM), (1, -signal.SIGKILL)])
    assert isinstance(error, WorkerError)
    assert "training process 1: expected a normal end, got signal 9 (SIGKILL)" in str(error)
    nameless = signal.SIGRTMIN + 1
    assert f"got signal {nameless}. " in str(failure_of(tmp_path, [(0, -nameless)]))


def test_a_full_disk_that_a_rank_finds_is_told_and_none_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OSError, match="No space left") as full:
        Path("/dev/full").write_text("x")
    note_failure(full.value)
    error = failure_of(tmp_path, [(0, 1)])
    assert isinstance(error, RunError)
    assert "training process 0: expected room on the disk, got [Errno 28]" in str(error)
    assert not is_worth_a_restart(error)


def test_a_note_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path / "absent"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    note_failure(RunError("teacher lost"))
    assert "teacher lost" in capsys.readouterr().err


WAITS_FOR_AN_ORPHAN = """
import os, sys, time
from pathlib import Path
from compresskit.training.worker import as_rank
parent = os.getppid()
Path(sys.argv[1]).with_name("begun").touch()
while os.getppid() == parent:
    time.sleep(0.01)
as_rank(lambda: Path(sys.argv[1]).with_name("went-on").touch())
"""


def test_a_rank_whose_parent_is_gone_before_it_begins_ends_too(tmp_path: Path) -> None:
    """It would train on, beside what the next start begins in the same place."""
    (tmp_path / "waiting_rank.py").write_text(WAITS_FOR_AN_ORPHAN)
    code = (
        "import sys; from pathlib import Path; from compresskit.training.launch import launch;"
        "launch('{}', 1, Path(sys.argv[1]), module='waiting_rank')"
    )
    path = os.pathsep.join([str(HERE.parents[2]), str(tmp_path)])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    ) as command:
        while not (tmp_path / "begun").exists() and command.poll() is None:
            time.sleep(0.01)
        (rank,) = psutil.Process(command.pid).children()
        command.kill()
    end = time.monotonic() + 60
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.01)  # in a container there may be nobody who takes notice of its end
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "went-on").exists()


def start(job: Path, changes: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from compresskit.training.job import TrainJob, train;"
        "train(TrainJob.from_json(Path(sys.argv[1]).read_text()))"
    )
    environment = (
        os.environ | {"PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"} | dict(changes or {})
    )
    with (job.parent / "log").open("ab") as log:
        command = [sys.executable, "-c", code, str(job)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_a_random_step_it_gives_the_same_bytes(
    job: TrainJob, tmp_path: Path, processes: int
) -> None:
    if processes > 1:
        job = with_fields(job, processes=2, strategy="fsdp")
    (tmp_path / "straight").mkdir()
    straight = replace(job, out=str(tmp_path / "straight"), scratch=str(tmp_path / "straight_scratch"))
    train(straight)
    path = tmp_path / "job.json"
    path.write_text(job.to_json())
    at = random.SystemRandom().randrange(4, 11)
    victim = start(path)
    log = LossLog(Path(job.scratch) / "losses.jsonl")
    deadline = time.monotonic() + 120
    while len(log.losses()) < at and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (Path(job.out) / "config.json").exists(), "it had ended before it could be killed"
    outcome = train(job)
    assert outcome.resumed_from >= 3, at
    mine, true = (Path(j.out) / "model.safetensors" for j in (job, straight))
    assert mine.read_bytes() == true.read_bytes(), f"killed after step {at}"
    assert log.losses() == LossLog(Path(straight.scratch) / "losses.jsonl").losses()
    assert json.loads((Path(job.scratch) / "outcome.json").read_text())["steps"] == 12
    if processes > 1:
        one_worker_is_lost(job, tmp_path, true)


def one_worker_is_lost(job: TrainJob, tmp_path: Path, true: Path) -> None:
    """And not the command: it starts both again by itself, and the bytes are those of ``true``."""
    (tmp_path / "restarted").mkdir()
    job = replace(job, out=str(tmp_path / "restarted"), scratch=str(tmp_path / "restarted_scratch"))
    path = tmp_path / "restarted.json"
    path.write_text(job.to_json())
    command = start(path, {"COMPRESSKIT_MAX_RESTARTS": "1"})
    log = LossLog(Path(job.scratch) / "losses.jsonl")
    deadline = time.monotonic() + 300
    while len(log.losses()) < 5 and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    max(psutil.Process(command.pid).children(), key=lambda child: child.create_time()).kill()
    assert len(log.losses()) < 12, "it had ended before it could be killed"
    assert command.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "SIGKILL" in (tmp_path / "log").read_text()
    assert "2 training processes start again" in (tmp_path / "log").read_text()
    assert outcome_from_json((Path(job.scratch) / "outcome.json").read_text()).resumed_from == 3
    assert (Path(job.out) / "model.safetensors").read_bytes() == true.read_bytes()


def test_of_a_damaged_checkpoint_the_one_before_is_used_and_it_is_said(job: TrainJob) -> None:
    straight = train(job)
    assert straight.warnings == ()
    weights = Path(job.out) / "model.safetensors"
    true = weights.read_bytes()
    weights.unlink()
    last = Path(job.scratch) / "checkpoints" / "checkpoint-12" / "optimizer.pt"
    os.truncate(last, last.stat().st_size // 2)
    outcome = train(job)
    assert outcome.resumed_from == 9
    (warning,) = outcome.warnings
    assert "checkpoint-12" in warning
    assert "step 9" in warning
    assert weights.read_bytes() == true
    assert outcome.final_loss == straight.final_loss


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a small disk here: {error}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def resize(place: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(place)], check=True)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_full_disk_stops_all_and_the_checkpoint_before_is_used(
    job: TrainJob, tmp_path: Path, small_disk: Path
) -> None:
    straight = with_fields(job, processes=2, strategy="ddp")
    train(straight)
    made = Path(job.scratch) / "checkpoints" / "checkpoint-12"
    need = sum(path.stat().st_size for path in made.iterdir())
    (tmp_path / "full").mkdir()
    full = replace(straight, out=str(tmp_path / "full"), scratch=str(small_disk / "scratch"))
    resize(small_disk, need + need // 2)
    with pytest.raises(CheckpointError, match=r"checkpoint-6: expected (.|\n)*after step 3"):
        train(full)
    kept = [path.name for path in (Path(full.scratch) / "checkpoints").iterdir()]
    assert kept == ["checkpoint-3"]
    resize(small_disk, 64 << 20)
    assert train(full).resumed_from == 3
    mine, true = (Path(j.out) / "model.safetensors" for j in (full, straight))
    assert mine.read_bytes() == true.read_bytes()
