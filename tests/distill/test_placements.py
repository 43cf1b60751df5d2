"""Where a teacher lives: what each placement refuses, and what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import outlook, tiny_llama

from compresskit.distill.placements import PLACEMENTS
from compresskit.distill.placements.base import Teaching
from compresskit.distill.stage import Distill
from compresskit.distill.teacher import Replica
from compresskit.formats.shards import read_header
from compresskit.modeling import ModelSource, open_model
from compresskit.progress import size
from compresskit.quant.qat import Qat
from compresskit.sparse.train import SparseTrain

VOCABULARY = 258


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path / "model", num_hidden_layers=3, initializer_range=0.2)))


def faults_of(source: ModelSource, placement: Any, **changes: Any) -> list[tuple[str, str]]:
    stage = Distill(teacher_placement=placement, batch_size=8, **changes)
    return [(f.where, f.got) for f in stage.faults(outlook(source), "s")]


def held(source: ModelSource, name: str, processes: int = 1, **options: Any) -> int:
    stage = Distill(processes=processes, batch_size=8)
    teaching = Teaching(teacher=source, vocabulary=VOCABULARY)
    return PLACEMENTS[name](**options).held_bytes(stage, outlook(source), teaching)


def test_an_unknown_placement_or_option_is_told(source: ModelSource) -> None:
    where = "s.teacher_placement"
    assert faults_of(source, "shart") == [(where, "'shart'")]
    assert faults_of(source, {"method": "replicate", "dtyp": "bfloat16"}) == [(f"{where}.dtyp", "'dtyp'")]
    assert faults_of(source, {"method": "replicate", "dtype": "int8"}) == [(f"{where}.dtype", "'int8'")]
    assert faults_of(source, {"method": "replicate", "dtype": "bfloat16"}) == []


def test_it_is_told_together_with_all_else(source: ModelSource) -> None:
    found = faults_of(source, "shart", loss="forward_lk", temperature=float("inf"))
    assert found == [
        ("s.loss", "'forward_lk'"),
        ("s.temperature", "inf"),
        ("s.teacher_placement", "'shart'"),
    ]


def test_one_process_has_no_one_to_share_with(source: ModelSource) -> None:
    assert faults_of(source, "shard") == [("s.teacher_placement", "one process")]
    assert faults_of(source, "shard", processes=2) == []


def test_what_is_held_shrinks_with_the_type_and_the_processes(source: ModelSource) -> None:
    assert held(source, "replicate") == source.bytes
    assert held(source, "replicate", dtype="bfloat16") == source.bytes / 2
    outside = 4 * sum(source.tensor(n).numel() for n in source.names() if ".layers." not in n)
    block = (source.bytes - outside) // 3
    assert held(source, "shard", 2) == pytest.approx((source.bytes + outside + block) / 2, abs=1)
    teaching = Teaching(teacher=source, vocabulary=VOCABULARY)
    on_gpu = replace(outlook(source), device="cuda")
    offloaded = PLACEMENTS["shard"](offload=True).held_bytes(Distill(processes=2), on_gpu, teaching)
    assert offloaded == outside + block
    assert held(source, "shard", 2, offload=True) == held(source, "shard", 2), "a CPU has only one memory"
    assert held(source, "shard", 4) < held(source, "shard", 2) < source.bytes


def test_a_replica_computes_in_the_type_asked_for(source: ModelSource) -> None:
    inputs = {name: torch.arange(12).reshape(1, 12) for name in ("input_ids", "position_ids")}
    said = [
        Replica(directory=str(source.directory), vocabulary=VOCABULARY, dtype=dtype).signal(inputs).says
        for dtype in ("auto", "bfloat16")
    ]
    whole, half = (says.states_BTE for says in said)  # type: ignore[union-attr]
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.1)


def test_the_rows_of_a_stored_tensor_are_read_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.arange(30.0).reshape(5, 3, 2).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    place = read_header(tmp_path / "model.safetensors")["b"]
    assert torch.equal(place.rows(1, 3).read(), tensors["b"][1:4])
    assert place.rows(5, 0).read().shape == (0, 3, 2)


def told_of(source: ModelSource, **changes: Any) -> str:
    (note,) = [n for n in Distill(batch_size=8, **changes).forecast(outlook(source)).notes if "Teacher" in n]
    return note


def test_a_plan_tells_what_each_placement_holds(source: ModelSource) -> None:
    """In one process there is no shard to have."""
    whole, eight, four = (size(held(source, name)) for name in ("replicate", "8bit", "4bit"))
    told = f"Teacher, in each process: replicate {whole} (chosen), 8bit {eight}, 4bit {four}, cache nothing"
    assert told_of(source).startswith(told)
    two = told_of(source, processes=2, teacher_placement="shard")
    assert f"replicate {whole}, shard {size(held(source, 'shard', 2))} (chosen), 8bit {eight}, " in two
    half = told_of(source, teacher_placement={"method": "replicate", "dtype": "bfloat16"})
    assert f"replicate {size(source.bytes / 2)} (chosen)" in half


def test_every_stage_with_a_teacher_tells_it(source: ModelSource) -> None:
    taught: dict[str, Any] = {"loss": "forward_kl", "teacher": str(source.directory)}
    for stage in (Qat(scheme="w8a8", **taught), SparseTrain(method="gradual", pattern="50%", **taught)):
        assert sum("Teacher" in note for note in stage.forecast(outlook(source)).notes) == 1
    assert not any("Teacher" in note for note in Qat(scheme="w8a8").forecast(outlook(source)).notes)


def test_the_shard_forecast_counts_what_is_held(source: ModelSource) -> None:
    there = Distill(batch_size=8, processes=2).forecast(outlook(source)).memory_bytes
    here = (
        Distill(batch_size=8, processes=2, teacher_placement="shard").forecast(outlook(source)).memory_bytes
    )
    assert there - here == source.bytes - held(source, "shard", 2)
