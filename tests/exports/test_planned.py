"""Exports that a recipe asks for, as the plan sees them: faults and disk."""

from __future__ import annotations

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import compresskit as ck
from compresskit.errors import OutputError, PlanError
from compresskit.planned import PACKAGES, Plan
from compresskit.stage import Stage
from tests.tiny import tiny_llama

STEPS = {"steps": 1, "context_length": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planned")
    tiny_llama(place / "model")
    (place / "text.txt").write_text("A line to read.")
    return place


def planned(place: Path, stage: Stage, *export: str) -> Plan:
    return ck.plan(
        ck.Recipe(model=str(place / "model"), data=str(place / "text.txt"), stages=(stage,), export=export)
    )


def test_an_adapter_that_no_target_holds_is_told_before(place: Path) -> None:
    pytest.importorskip("peft")
    stage = ck.Qlora(base="none", finish="adapter", rank=4, **STEPS)
    planned(place, stage)
    with pytest.raises(PlanError, match="an adapter beside the model that no target holds") as told:
        planned(place, stage, "dense", "gguf")
    assert len(told.value.faults) == 1
    planned(place, replace(stage, finish="merge"), "dense")


def test_disk_holds_each_export_and_what_is_merged_before_it_is_rounded(place: Path) -> None:
    stage = ck.Quantize(scheme="w8a16")
    alone = planned(place, stage)
    dense = round(alone.source.anatomy.num_parameters * 4)
    for count, targets in enumerate((["dense"], ["dense", "compressed-tensors"]), 1):
        assert planned(place, stage, *targets).disk_bytes == alone.disk_bytes + count * dense
    pytest.importorskip("peft")
    merge = ck.Qlora(base="none", finish="merge", rank=4, **STEPS)
    grid = replace(merge, finish="grid", scheme="w8a16", rounding="rtn")
    assert planned(place, grid).disk_bytes == planned(place, merge).disk_bytes + dense


def test_disk_holds_two_checkpoints_of_each_process_that_writes_its_own(place: Path) -> None:
    """Weights and two states in fp32: ranks that step alone write them all, and so does each pipeline."""

    def needed(**changes: Any) -> int:
        return planned(place, ck.Finetune(batch_size=16, **STEPS, **changes)).disk_bytes

    one = needed()
    written = 2 * 12 * planned(place, ck.Finetune(**STEPS)).source.anatomy.num_parameters
    assert needed(processes=4) == one
    assert needed(processes=4, synchronise="local_sgd") == one + 3 * written
    assert needed(processes=2, pipeline_stages=2) == one
    assert needed(processes=4, pipeline_stages=2) == one + written


def test_what_is_written_already_needs_no_free_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that continues finds a part of its bytes on the disk, in whatever folder below."""
    plan = planned(place, ck.Finetune(**STEPS))
    (tmp_path / "deep").mkdir()
    free = {"bytes": plan.disk_bytes}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free["bytes"]))
    plan.check_disk(tmp_path)
    free["bytes"] -= 1000
    with pytest.raises(OutputError, match="free disk"):
        plan.check_disk(tmp_path)
    (tmp_path / "deep" / "kept").write_bytes(bytes(999))
    with pytest.raises(OutputError, match="Free some"):
        plan.check_disk(tmp_path)
    (tmp_path / "one").write_bytes(bytes(1))
    plan.check_disk(tmp_path)


def test_every_optional_package_shapes_the_plans_digest() -> None:
    project = tomllib.loads((Path(ck.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    without = ("dev", "test", "cuda")  # with the last packed weights are multiplied, and none is made
    extras = {n: wanted for n, wanted in project["optional-dependencies"].items() if n not in without}
    names = {re.split(r"[<>=\[; ]", text)[0] for wanted in extras.values() for text in wanted}
    assert names - {"compresskit"} <= set(PACKAGES)
