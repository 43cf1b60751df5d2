"""A run on several machines: one of them lost, one that never comes, one with another recipe or disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import ROOT, two_hosts
from safetensors.torch import load_file

from compresskit.artifact import open_artifact
from compresskit.training.launch import _free_port
from compresskit.training.watch import LossLog
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LIMIT_S = 600
STEPS = 40
RECIPE = """\
model: model
data: text.jsonl
stages:
  - finetune:
      {{steps: 40, batch_size: 4, context_length: 32, checkpoint_every: 5, strategy: {strategy}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("machines")
    tiny_llama(place / "model", num_hidden_layers=1)
    rows = (json.dumps({"text": f"Row {n}: {n} and {n} are {n + n}."}) for n in range(200))
    (place / "text.jsonl").write_text("\n".join(rows))
    for strategy in ("ddp", "fsdp"):
        (place / f"{strategy}.yaml").write_text(RECIPE.format(strategy=strategy))
    (place / "other.yaml").write_text(RECIPE.format(strategy="ddp").replace("40", "30"))
    return place


def command(recipe: str, out: str, *launch: str) -> list[str]:
    return ["run", f"{recipe}.yaml", "-o", out, "--measure", "none", *launch]


def launch(rank: int, address: str = "10.231.0.1:29400", **options: int) -> list[str]:
    given = {"nnodes": 2, "node-rank": rank, **{k.replace("_", "-"): v for k, v in options.items()}}
    return [f"--rdzv={address}", *(f"--{name}={value}" for name, value in given.items())]


def wait(until: Callable[[], bool], *running: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not until():
        assert all(process.poll() is None for process in running), f"one ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def losses(place: Path, out: str) -> list[float]:
    return LossLog(place / out / "records" / "1-finetune.losses.jsonl").losses()


def run_here(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "compresskit", *arguments]
    return subprocess.run(whole, cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def run_whole(place: Path, strategy: str) -> None:
    """The run that nothing breaks, on one machine, unless there is one already."""
    whole = run_here(place, *command(strategy, f"whole-{strategy}", "--nproc=2"))
    assert whole.returncode == 0, whole.stderr[-3000:]


def assert_like_whole(place: Path, out: str, strategy: str) -> None:
    """The losses of every step, and the weights, are those of the run that nothing broke, to the bit."""
    assert losses(place, out) == losses(place, f"whole-{strategy}")
    mine, true = (load_file(place / name / "model.safetensors") for name in (out, f"whole-{strategy}"))
    assert mine.keys() == true.keys()
    assert all(tensor.equal(true[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(("strategy", "silently"), [("ddp", True), ("fsdp", False)])
def test_a_lost_host_that_comes_back_changes_no_byte(
    place: Path, tmp_path: Path, strategy: str, silently: bool
) -> None:
    """Silently: its cable is cut first, so that no connection to it is ever closed."""
    run_whole(place, strategy)
    out = f"lost-{strategy}"
    log = LossLog(place / f".{out}.work" / "1-finetune.scratch" / "losses.jsonl")
    told = [tmp_path / "a.log", tmp_path / "b.log"]
    with two_hosts() as (a, b):
        first = a.start(place, told[0], *command(strategy, out, *launch(0, max_restarts=2)))
        second = b.start(place, told[1], *command(strategy, out, *launch(1, max_restarts=2)))
        wait(lambda: len(log.losses()) >= 12, first, second, what="step 12")
        if silently:
            b.plug("down")
        b.kill()
        assert len(log.losses()) < STEPS
        cut = time.monotonic()
        wait(lambda: "start again" in told[0].read_text(), first, what="host a starts again")
        print(f"{strategy}, cable cut {silently}: host a stopped after {time.monotonic() - cut:.1f} s")
        b.plug("up")
        again = b.start(place, told[1], *command(strategy, out, *launch(1, max_restarts=2)))
        assert (first.wait(LIMIT_S), again.wait(LIMIT_S)) == (0, 0), told[0].read_text()[-3000:]
        print(f"{strategy}: done {time.monotonic() - cut:.1f} s after the loss")
    metrics = open_artifact(place / out).manifest["stages"][0]["result"]["metrics"]
    assert (metrics["engine"], metrics["processes"]) == (strategy, 2)
    assert_like_whole(place, out, strategy)
    if silently:
        assert "training process 1 of 2 (host-b): expected a sign of life" in told[0].read_text()


def test_machine_0_where_all_meet_may_be_lost_and_come_back(place: Path, tmp_path: Path) -> None:
    run_whole(place, "ddp")
    address = f"127.0.0.1:{_free_port()}"

    def begin(rank: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = command("ddp", "zero", *launch(rank, address, max_restarts=2))
        with (tmp_path / f"{rank}.log").open("ab") as log:
            whole = [sys.executable, "-m", "compresskit", *arguments]
            return subprocess.Popen(whole, cwd=place, env=environment, stdout=log, stderr=log)

    first, second = begin(0), begin(1)
    log = LossLog(place / ".zero.work" / "1-finetune.scratch" / "losses.jsonl")
    wait(lambda: len(log.losses()) >= 12, first, second, what="step 12")
    first.kill()  # its processes end with it
    first.wait()
    assert len(log.losses()) < STEPS
    told = tmp_path / "1.log"
    wait(lambda: "Machine 0 was lost" in told.read_text(), second, what="machine 1 says so")
    again = begin(0)
    assert (again.wait(LIMIT_S), second.wait(LIMIT_S)) == (0, 0), told.read_text()[-3000:]
    assert_like_whole(place, "zero", "ddp")


def agents(place: Path, log: Path, *of_each: tuple[list[str], dict[str, str]]) -> list[int]:
    """Exit codes of one agent for each pair of arguments and variables, all on this machine."""
    running = []
    for number, (arguments, changes) in enumerate(of_each):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes
        with log.with_suffix(f".{number}").open("ab") as file:
            whole = [sys.executable, "-m", "compresskit", *arguments]
            running.append(subprocess.Popen(whole, cwd=place, env=environment, stdout=file, stderr=file))
    return [process.wait(LIMIT_S) for process in running]


def test_machines_of_a_slurm_step_that_differ_in_recipe_or_disk_are_refused(
    place: Path, tmp_path: Path
) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"}
    step |= {"SLURM_JOB_NODELIST": "127.0.0.1,other", "SLURM_JOB_ID": str(_free_port())}
    both = [step | {"SLURM_NODEID": "0"}, step | {"SLURM_NODEID": "1"}]
    recipes = [command("ddp", "refused"), command("other", "refused")]
    log = tmp_path / "recipe"
    assert agents(place, log, *zip(recipes, both, strict=True)) == [2, 2]
    for number in range(2):
        text = log.with_suffix(f".{number}").read_text()
        assert "recipe stages[0].finetune.steps: expected 40, as on rank 0" in text
        assert "got 30 on rank 1" in text or "got 40 on rank 1" in text
        assert text.count("error:") == 1
    (place / "own").mkdir()
    disks = [command("ddp", "refused"), command("ddp", "own/refused")]
    log = tmp_path / "disk"
    assert agents(place, log, *zip(disks, both, strict=True)) == [2, 2]
    for number in range(2):
        text = log.with_suffix(f".{number}").read_text()
        assert "expected one directory on a file system that all machines share" in text
        assert "on rank 1" in text
    assert not list(place.glob(".refused*"))
    assert not (place / "refused").exists()


def test_a_machine_that_never_comes_ends_the_others_in_time(place: Path, tmp_path: Path) -> None:
    options = launch(0, f"127.0.0.1:{_free_port()}", rdzv_timeout=4)
    away = launch(1, f"127.0.0.1:{_free_port()}", rdzv_timeout=4)
    both = [(command("ddp", "alone", *options), {}), (command("ddp", "alone", *away), {})]
    assert agents(place, tmp_path / "log", *both) == [3, 3]
    first, second = ((tmp_path / f"log.{number}").read_text() for number in range(2))
    assert "machine 0 of 2: expected 2 machines within 4 s, got 1" in first
    assert "--rdzv-timeout" in first
    assert "machine 1 of 2: expected an answer of machine 0, got none" in second
