"""A whole recipe under torchrun: every rank runs the command, rank 0 does what needs no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.artifact import open_artifact
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RECIPE = """\
model: model
data: text.jsonl
stages:
  - prune: {method: magnitude, pattern: 2:4}
  - finetune: {steps: 4, batch_size: 4, context_length: 64, checkpoint_every: 0, strategy: ddp}
  - quantize: {method: rtn, scheme: w8a8}
"""


def test_torchrun_gives_one_artifact_and_trains_on_all_ranks(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    rows = (json.dumps({"text": f"Row {n}: {n} and {n} are {n + n}."}) for n in range(200))
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "compresskit", "run", "recipe.yaml", "-o", "out", "--measure", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("artifact: out") == 1
    artifact = open_artifact(tmp_path / "out")
    assert artifact.damaged() == ()
    assert artifact.manifest["stages"][1]["result"]["metrics"]["engine"] == "ddp"
    assert artifact.manifest["stages"][1]["result"]["metrics"]["processes"] == 2
    assert artifact.manifest["stages"][2]["checks"]["zeros"] == {"checked": 14, "kept": 14}
    assert not list(tmp_path.glob(".out*"))
