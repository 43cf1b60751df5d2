"""A cached teacher under two ranks: one cache, made before they start, and the losses of one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import story, tiny_llama

from compresskit.data.spec import DataSpec
from compresskit.distill.stage import Distill
from compresskit.modeling import open_model
from compresskit.stage import StageContext, StageResult
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FEW = {"steps": 8, "batch_size": 4, "context_length": 24, "learning_rate": 1e-2, "checkpoint_every": 0}
TOLERANCE = 2e-5


def run(stage: Distill, place: Path, name: str) -> tuple[StageResult, list[float]]:
    out, scratch = place / name, place / f"{name}-scratch"
    out.mkdir()
    scratch.mkdir()
    source = open_model(str(place / "student"))
    settings: dict[str, Any] = {"original": source.directory, "cache": place / "cache", "device": "cpu"}
    data = DataSpec(source=str(place / "text.jsonl"))
    result = stage.run(source, StageContext(out=out, scratch=scratch, data=data, **settings))
    return result, LossLog(scratch / "losses.jsonl").losses()


@pytest.mark.parametrize("placement", [{"keep": "hidden"}, {"k": 8}])
def test_two_ranks_read_one_cache(tmp_path: Path, placement: dict[str, Any]) -> None:
    tiny_llama(tmp_path / "teacher", initializer_range=0.2)
    tiny_llama(tmp_path / "student", seed=1, hidden_size=16, intermediate_size=32)
    rows = (json.dumps({"text": story(i)}) for i in range(24))
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    stage = Distill(
        teacher=str(tmp_path / "teacher"), teacher_placement={"method": "cache", **placement}, **FEW
    )
    both, found = run(replace(stage, processes=2, strategy="ddp"), tmp_path, "two")
    assert (both.metrics["engine"], both.metrics["processes"]) == ("ddp", 2)
    folders = [path for path in (tmp_path / "cache" / "teacher").iterdir() if path.name != "files"]
    assert len(folders) == 1
    stamps = {path: path.stat().st_mtime_ns for path in folders[0].glob("*.*")}
    one, expected = run(stage, tmp_path, "one")
    assert {path: path.stat().st_mtime_ns for path in folders[0].glob("*.*")} == stamps
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert expected[-1] < 0.95 * expected[0], "nothing was learnt, so nothing was compared"
    assert both.metrics["validation_loss"] == pytest.approx(one.metrics["validation_loss"], rel=TOLERANCE)
    assert both.metrics["teacher"] == one.metrics["teacher"]
