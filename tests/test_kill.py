"""kill -9 in the middle of a run; the same command started again ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compresskit.artifact import open_artifact
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


def start(place: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "compresskit", "run", "recipe.yaml", "-o", str(out), "--measure", "none"]
    return subprocess.Popen(command, cwd=place, start_new_session=True, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], sign: Path, pattern: str) -> None:
    """SIGKILL the whole process group as soon as ``pattern`` matches something in ``sign``."""
    deadline = time.monotonic() + PATIENCE_S
    while not (sign.is_dir() and any(sign.glob(pattern))):
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
        kill_when(start(place, killed), work, pattern)
        assert not killed.exists(), "half an artifact was published"
    assert start(place, killed).wait() == 0
    assert open_artifact(killed).digest == open_artifact(undisturbed).digest
    assert open_artifact(killed).damaged() == ()
    assert not work.exists()
    losses = (killed / "records" / "2-distill.losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in losses if "loss" in line][-1] == 30
