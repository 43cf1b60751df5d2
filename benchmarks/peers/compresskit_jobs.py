"""compresskit at the jobs of a file: the counterpart of llmcompressor_jobs.py, with the same answer.

    python -m benchmarks.peers.compresskit_jobs JOBS.json

``JOBS.json``: ``{"model", "data", "rows", "context_length", "threads", "answer", "jobs": [{"name", "stage",
"out"}]}``; ``stage`` is one of a recipe's, ``{"quantize": {...}}``, to which rows and context length are
added; ``data`` is the text whose rows the peer gets as token ids.

Counted in a job's seconds: planning, reading the model, tokenising, calibration, the stage, the checks of
every promise, writing the checkpoint and, if it is packed, reading it back; not the imports.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# Imported here so that no import is timed, as the peer's are not.
import compresskit as ck
import compresskit.formats.checkpoint
import compresskit.pipeline
import compresskit.quant.oneshot
import compresskit.sparse.oneshot
from benchmarks.peers.call import calibration_data
from compresskit.measure.record import versions
from compresskit.recipe import recipe_from


def run_job(task: dict[str, Any], job: dict[str, Any]) -> float:
    """Compress one model into ``job["out"]`` and return the seconds."""
    began = time.perf_counter()
    ((kind, fields),) = job["stage"].items()
    rows = {"samples": task["rows"], "context_length": task["context_length"]}
    data = asdict(calibration_data(task["data"]))
    recipe = recipe_from({"model": task["model"], "data": data, "stages": [{kind: {**fields, **rows}}]}, {})
    ck.run(recipe, job["out"], measures=())
    return time.perf_counter() - began


def main() -> None:
    """Run every job; a job that fails is told in the answer, and the next one is run."""
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    seconds, errors = {}, {}
    for job in task["jobs"]:
        try:
            seconds[job["name"]] = run_job(task, job)
        except Exception as error:
            errors[job["name"]] = f"{type(error).__name__}: {error}"
    answer = {"seconds": seconds, "errors": errors, "versions": versions()}
    Path(task["answer"]).write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
