"""kill -9 in the middle of a run; the same command started again ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from compresskit.artifact import open_artifact
from tests.completions_server import NAME, serving
from tests.tiny import tiny_llama

RECIPE = """\
model: {place}/model
data: {place}/text.jsonl
stages:
  - prune: {{method: wanda, pattern: 2:4, samples: 8}}
  - distill: {{steps: 30, batch_size: 4, context_length: 64, checkpoint_every: 5}}
  - quantize: {{method: rtn, scheme: w8a8}}
"""
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kill")
    tiny_llama(place / "model")
    rows = (json.dumps({"text": f"Row {n}: {n} and {n} are {n + n}."}) for n in range(300))
    (place / "text.jsonl").write_text("\n".join(rows))
    (place / "recipe.yaml").write_text(RECIPE.format(place=place))
    return place


def start(place: Path, out: Path, recipe: str = "recipe.yaml") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "compresskit", "run", recipe, "-o", str(out), "--measure", "none"]
    return subprocess.Popen(command, cwd=place, start_new_session=True, stderr=subprocess.DEVNULL)


def is_there(folder: Path, pattern: str) -> bool:
    return folder.is_dir() and any(folder.glob(pattern))


def kill_when(process: subprocess.Popen[bytes], sign: Callable[[], bool]) -> None:
    """SIGKILL the whole process group as soon as there is a ``sign``."""
    deadline = time.monotonic() + PATIENCE_S
    while not sign():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_again_and_again_the_bytes_are_the_same(place: Path) -> None:
    undisturbed, killed = place / "undisturbed", place / "killed"
    assert start(place, undisturbed).wait() == 0
    work = place / ".killed.work"
    for pattern in (
        "1-prune.partial",
        "2-distill.scratch/**/checkpoint-10",
        "2-distill",
        "3-quantize.partial",
    ):
        kill_when(start(place, killed), partial(is_there, work, pattern))
        assert not killed.exists(), "half an artifact was published"
    assert start(place, killed).wait() == 0
    assert open_artifact(killed).digest == open_artifact(undisturbed).digest
    assert open_artifact(killed).damaged() == ()
    assert not work.exists()
    losses = (killed / "records" / "2-distill.losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in losses if "loss" in line][-1] == 30


SERVED = """\
model: {place}/model
data: {place}/text.jsonl
stages:
  - distill:
      steps: 8
      batch_size: 4
      micro_batch_size: 2
      context_length: 32
      checkpoint_every: 0
      teacher_placement: {{method: server, url: "{url}", model: {name}, top_k: 8, retries: 1}}
"""


@pytest.mark.slow
def test_a_lost_server_and_a_kill_behind_it_change_no_byte(place: Path) -> None:
    """What the run that lost its server kept outlives the run that goes on from there."""
    undisturbed, lost = place / "served", place / "lost"
    with serving(place / "model") as (url, teacher):
        (place / "served.yaml").write_text(SERVED.format(place=place, url=url, name=NAME))
        assert start(place, undisturbed, "served.yaml").wait() == 0
        asked = len(teacher.prompts)
        teacher.lives = asked + asked // 2
        assert start(place, lost, "served.yaml").wait() == 3, "the exit code of a run that had to stop"
        (kept,) = (place / ".lost.work").rglob("checkpoint-*")
        step = int(kept.name.removeprefix("checkpoint-"))
        assert 0 < step < 8
        (log,) = (place / ".lost.work").rglob("losses.jsonl")
        teacher.lives = None
        again = start(place, lost, "served.yaml")
        kill_when(again, lambda: f'"step": {step + 1},' in log.read_text())
        assert [path.name for path in (place / ".lost.work").rglob("checkpoint-*")] == [kept.name]
        assert start(place, lost, "served.yaml").wait() == 0
    assert open_artifact(lost).digest == open_artifact(undisturbed).digest
    assert open_artifact(lost).damaged() == ()
