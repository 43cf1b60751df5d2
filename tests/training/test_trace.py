"""How much communication a trace shows beside computation: traces made up, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from compresskit.training.fields import TrainingFields
from compresskit.training.order import Rows
from compresskit.training.run import Run
from compresskit.training.trace import OVERLAP, Overlap, overlap_of, read_overlap, trace_path

Make = Callable[..., LlamaForCausalLM]


def span(name: str, start: float, end: float, cat: str = "cpu_op") -> dict[str, Any]:
    """An operation, in microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}


def test_of_a_cpu_by_hand() -> None:
    """Computation covers 0-1000, 2000-3000 and 6000-6500; communication 500-2500 and 6200-7200."""
    events = [
        span("gloo:all_reduce", 500, 2500, "user_annotation"),
        span("gloo:all_gather", 6200, 7000, "user_annotation"),
        span("gloo:all_reduce", 6900, 7200, "user_annotation"),
        span("aten::mm", 2000, 3000),
        span("aten::linear", 0, 1000),
        span("aten::mm", 100, 900),
        span("aten::add", 6000, 6400),
        span("aten::add", 6400, 6500),
        span("c10d::allreduce_", 400, 5000),
        span("autograd::engine::evaluate_function: AddmmBackward0", 0, 9000),
        {"ph": "i", "name": "gloo:all_reduce", "ts": 0},
    ]
    found = overlap_of(events)
    assert found == Overlap(communication_ms=3.0, compute_ms=2.5, overlapped_ms=1.3)
    assert found.overlapped_fraction == pytest.approx(1.3 / 3)
    assert overlap_of(reversed(events)) == found


def test_of_a_gpu_by_hand() -> None:
    """Its kernels alone count: what the CPU does meanwhile neither computes nor communicates."""
    found = overlap_of(
        [
            span("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1000, 2000, "kernel"),
            span("ampere_sgemm_128x64_nn", 0, 1250, "kernel"),
            span("vectorized_elementwise_kernel", 1750, 4000, "kernel"),
            span("aten::mm", 0, 9000),
            span("gloo:all_reduce", 0, 9000, "user_annotation"),
        ]
    )
    assert found == Overlap(communication_ms=1.0, compute_ms=3.5, overlapped_ms=0.5)
    assert found.overlapped_fraction == 0.5


def test_nothing_to_communicate() -> None:
    found = overlap_of([span("aten::mm", 0, 500)])
    assert (found.communication_ms, found.compute_ms, found.overlapped_fraction) == (0, 0.5, 0)


@pytest.mark.parametrize("trace", [0, 1, 2])
def test_a_run_writes_its_steps_down(trace: int, make_model: Make, rows: Rows, tmp_path: Path) -> None:
    for old in (trace_path(tmp_path, 0), tmp_path / OVERLAP):
        old.write_text("of a run before")
    fields = TrainingFields(steps=4, batch_size=4, checkpoint_every=0, trace=trace)
    Run(make_model(), rows, fields=fields, scratch=tmp_path, device="cpu").train()
    if not trace:
        assert not trace_path(tmp_path, 0).exists()
        assert not (tmp_path / OVERLAP).exists()
        return
    found = read_overlap(trace_path(tmp_path, 0))
    said = json.loads((tmp_path / OVERLAP).read_text())
    assert said == {
        "communication_ms": 0.0,
        "compute_ms": found.compute_ms,
        "overlapped_ms": 0.0,
        "overlapped_fraction": 0.0,
    }
    names = [event["name"] for event in json.loads(trace_path(tmp_path, 0).read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == trace
