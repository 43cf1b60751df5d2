"""A few steps of a predicted combination, taken on this machine: what was held, and how long they took."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import Fault, PlanError, WorkerError
from compresskit.foresight.candidates import Row
from compresskit.foresight.forecast import Forecast, Foresight
from compresskit.foresight.rank import PEAK, STEPS
from compresskit.home import cache_home
from compresskit.options import Choice
from compresskit.training.launch import JOB, TRACEBACK_LINES, launch
from compresskit.training.rules.asynchronous import ALONE, ZENFLOW

MODULE = "compresskit.foresight.rank"
QUIET: Mapping[str, Any] = {"eval_every": 0, "keep_best": False, "trackers": (), "checkpoint_every": 0}
"""Fields of a trial: nothing but steps."""
SELDOM: Mapping[str, Any] = {"synchronise_every": 2, "synchronise_from": 0, "steps": 5}
"""Where ranks step alone: what an exchange keeps is there after the first, and in use at the second."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Prediction and measurement.

    Attributes:
        name: of the stage.
        strategy: what was tried.
        checkpointing: of it.
        micro_batch_size: of it.
        predicted_bytes: of tensors, in the fullest process.
        measured_bytes: the same.
        predicted_weight_bytes: of these the weights that a process keeps between steps.
        measured_weight_bytes: the same.
        predicted_tokens_s: of all processes.
        measured_tokens_s: the same, slowed by the counting on a CPU.
        held_bytes: of parameters, in each process; see ``compresskit.foresight.measure.Counted``.
    """

    name: str
    strategy: str
    checkpointing: str
    micro_batch_size: int
    predicted_bytes: int
    measured_bytes: int
    predicted_weight_bytes: int
    measured_weight_bytes: int
    predicted_tokens_s: float
    measured_tokens_s: float
    held_bytes: tuple[Mapping[str, int], ...] = ()

    @property
    def error(self) -> float:
        """Of the predicted bytes, relative to the measured ones."""
        return self.predicted_bytes / max(self.measured_bytes, 1) - 1

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "relative_error": self.error}

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.strategy}, recompute {self.checkpointing}, {self.micro_batch_size} rows: "
            f"predicted {self.predicted_bytes / 1e6:,.1f} MB, measured {self.measured_bytes / 1e6:,.1f} MB "
            f"({100 * self.error:+.1f}%); predicted {self.predicted_tokens_s:,.0f} tokens/s, measured "
            f"{self.measured_tokens_s:,.0f}"
        )


def verify(foresight: Foresight, one: Forecast, row: Row, cache: Path | None = None) -> Verified:
    """Run a few steps of ``row`` in processes of its own, on the recipe's data.

    Args:
        foresight: of this machine.
        one: the stage.
        row: which combination of it.
        cache: of tokens; None is ``~/.cache/compresskit`` or ``COMPRESSKIT_CACHE``.

    Returns:
        What was predicted, and what was measured.

    Raises:
        PlanError: the stage is given a model that another stage has yet to cut, or ZenFlow steps.
        WorkerError: a process died.
    """
    index = int(one.subject.name.partition("-")[0]) - 1
    stages = foresight.recipe.stages
    if any(stage.reshapes for stage in stages[:index]):
        cure = "Verify without the cut, or run the recipe up to this stage and verify from there."
        got = "one after a cut, whose model is not there yet"
        raise PlanError(Fault(f"stages[{index}]", "a stage whose model is there", got, cure))
    if one.subject.stage.synchronise == ZENFLOW:
        cure = "Verify with synchronise every_step, or leave --verify out."
        got = "zenflow, whose steps DeepSpeed takes by itself"
        raise PlanError(Fault(f"stages[{index}].synchronise", "steps that can be watched", got, cure))
    assert row.peak is not None
    assert row.pace is not None
    cache = cache or cache_home()
    changes = {name: _plain(value) for name, value in row.combination.changes.items()} | {"steps": STEPS}
    if one.subject.stage.synchronise in ALONE:
        changes |= {**SELDOM, "synchronise_delay": min(one.subject.stage.synchronise_delay, 1)}
    job = {
        "recipe": foresight.recipe.to_json(),
        "stage": index,
        "changes": {**changes, **QUIET},
        "cache": str(cache),
    }
    processes = int(changes["processes"])
    with tempfile.TemporaryDirectory(prefix="compresskit-") as place:
        _run(json.dumps(job), processes, Path(place), zero=changes["strategy"] == "deepspeed")
        read = [json.loads((Path(place) / PEAK.format(r)).read_text("utf-8")) for r in range(processes)]
    ends, fullest = read[0]["step_ends"], max(read, key=lambda found: found["peak_bytes"])
    tokens = (changes["steps"] - 1) * one.subject.stage.batch_size * one.subject.tokens
    return Verified(
        name=one.subject.name,
        strategy=row.combination.strategy,
        checkpointing=row.combination.checkpointing,
        micro_batch_size=row.combination.rows,
        predicted_bytes=row.peak.bytes,
        measured_bytes=fullest["peak_bytes"],
        predicted_weight_bytes=round(row.peak.terms["weights"]),
        measured_weight_bytes=fullest["held_bytes"]["weights"],
        predicted_tokens_s=row.pace.tokens_s,
        measured_tokens_s=tokens * 1e9 / max(ends[-1] - ends[0], 1),
        held_bytes=tuple(found["held_bytes"] for found in read),
    )


def _run(job: str, processes: int, scratch: Path, *, zero: bool) -> None:
    """One process that is no launch, unless an engine needs one; or several."""
    if processes > 1 or zero:
        launch(job, processes, scratch, module=MODULE)
        return
    path = scratch / JOB
    path.write_text(job, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", MODULE, str(path)], capture_output=True, text=True)
    if done.returncode:
        lines = "\n".join(done.stderr.splitlines()[-TRACEBACK_LINES:])
        raise WorkerError(f"the trial failed; its traceback:\n{lines}")


def _plain(value: Any) -> Any:
    """A field's value as the recipe would write it."""
    return {"method": value.method, **dict(value.options)} if isinstance(value, Choice) else value
