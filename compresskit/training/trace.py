"""What a few steps spent on computing, and on exchanging with other processes, and how much of it at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import Trainer, TrainerCallback

from compresskit.training.rules.overlap import UNTRACED
from compresskit.training.setting import this_rank

OVERLAP = "overlap.json"
Interval = tuple[float, float]
"""Start and end, in microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How the time of a trace was spent.

    Attributes:
        communication_ms: in which at least one exchange was under way.
        compute_ms: in which at least one operation computed.
        overlapped_ms: in which both did.
    """

    communication_ms: float
    compute_ms: float
    overlapped_ms: float

    @property
    def overlapped_fraction(self) -> float:
        """Of the time of communication, that in which something computed too; 0 where there was none."""
        return self.overlapped_ms / self.communication_ms if self.communication_ms else 0.0


def overlap_of(events: Iterable[Mapping[str, Any]]) -> Overlap:
    """How much of the communication in a trace is hidden behind computation.

    With kernels of a GPU in the trace they alone count: those of NCCL communicate, all others compute.
    Without any, gloo's operations communicate and torch's own compute.

    Args:
        events: ``traceEvents`` of a Chrome trace of one process.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = [span for span in spans if span.get("cat") == "kernel"]
    if kernels:
        talks = [span for span in kernels if span["name"].startswith("nccl")]
        works = [span for span in kernels if not span["name"].startswith("nccl")]
    else:
        talks = [span for span in spans if span["name"].startswith("gloo:")]
        works = [span for span in spans if span["name"].startswith("aten::")]
    communication, compute = _union(talks), _union(works)
    return Overlap(
        communication_ms=_length_ms(communication),
        compute_ms=_length_ms(compute),
        overlapped_ms=_length_ms(_common(communication, compute)),
    )


def read_overlap(path: Path) -> Overlap:
    """Of a Chrome trace in a file."""
    return overlap_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def trace_path(scratch: Path, rank: int) -> Path:
    """Where a rank's trace is; a browser's ``chrome://tracing`` and Perfetto show it."""
    return scratch / f"trace-{rank}.json"


def trace_steps(trainer: Trainer, steps: int, scratch: Path, *, done: int) -> None:
    """Have ``trainer`` write down its next steps but the first two, and how their exchanges overlapped.

    Args:
        trainer: whose ``resources`` are closed after training.
        steps: to trace, fewer where training ends before; 0 for none.
        scratch: gets each rank's trace, and the main one's ``overlap.json``.
        done: steps that are behind; a trace of an earlier start stays.
    """
    path = trace_path(scratch, this_rank())
    if not done:
        for old in (path, scratch / OVERLAP):
            old.unlink(missing_ok=True)
    if steps and not path.exists():
        trainer.add_callback(_Tracing(trainer, steps, path))


class _Tracing(TrainerCallback):
    """Runs torch's profiler from the beginning of training to the last step to trace."""

    def __init__(self, trainer: Any, steps: int, path: Path) -> None:
        self._trainer = trainer
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # After the first step DDP sorts its buckets anew; in the second the profiler warms up.
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=UNTRACED - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=partial(_write, path),
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._profile.start()
        self._trainer.resources.callback(self._profile.stop)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._profile.step()


def _write(path: Path, recorded: Any) -> None:
    """The whole trace or none, and of the main process what it comes to."""
    partial_path = path.with_suffix(".partial")
    recorded.export_chrome_trace(str(partial_path))
    os.replace(partial_path, path)
    if not this_rank():
        found = read_overlap(path)
        said = asdict(found) | {"overlapped_fraction": found.overlapped_fraction}
        (path.parent / OVERLAP).write_text(json.dumps(said), encoding="utf-8")


def _union(spans: Iterable[Mapping[str, Any]]) -> list[Interval]:
    """The time that ``spans`` cover, as intervals that neither meet nor overlap, in order."""
    merged: list[Interval] = []
    for start, end in sorted((float(s["ts"]), float(s["ts"]) + float(s["dur"])) for s in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _common(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """The time that lies in both."""
    shared, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < end:
            shared.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return shared


def _length_ms(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals) / 1000
