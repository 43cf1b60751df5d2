"""What stands in an adapter's directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import projections

from compresskit.modeling import ModelSource

WRITE = """
import sys
from pathlib import Path
from compresskit.modeling import ModelSource, skeleton
from compresskit.training.adapters.attach import attach, write_adapter
source, out, targets = ModelSource(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3:]
for kind in ("lora", "bottleneck"):
    tuned = attach(
        skeleton(source), kind, anatomy=source.anatomy, targets=targets, rank=2, alpha=4.0, dropout=0.0
    )
    named = tuned.get_base_model().state_dict().items()
    trained = {n: t.new_zeros(t.shape, device="cpu") for n, t in named if "lora_" in n or "bottle" in n}
    write_adapter(tuned, trained, out / kind)
"""


def test_the_same_adapter_has_the_same_bytes_on_every_start(
    dense: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for out in (here, there):
        out.mkdir()
    monkeypatch.setattr(sys, "argv", ["-c", str(dense.directory), str(here), *projections(dense)])
    exec(WRITE, {})
    command = [sys.executable, "-c", WRITE, str(dense.directory), str(there), *projections(dense)]
    # Another seed than this process has, whose own is drawn at random.
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    found = [{str(p.relative_to(o)): p.read_bytes() for p in o.glob("*/*")} for o in (here, there)]
    assert found[0] == found[1]
    assert len(found[0]) == 4
    for kind in ("lora", "bottleneck"):
        assert len(json.loads(found[0][f"{kind}/adapter_config.json"])["target_modules"]) > 2
