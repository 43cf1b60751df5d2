"""Time and memory are measured in a fresh process, so that nothing else in this one counts. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compresskit
from compresskit import errors
from compresskit.errors import Fault, WorkerError

Json = Any

TAIL_CHARACTERS = 2000


def run_probe(probe: str, job: Mapping[str, Json], *, threads: int) -> dict[str, Json]:
    """Run one probe of :mod:`compresskit.measure.probe` in a new interpreter.

    Args:
        probe: ``latency`` or ``memory``.
        job: plain data that the probe reads.
        threads: of one operation; set for OpenMP, MKL and torch before they start.

    Returns:
        The probe's answer.

    Raises:
        CompressKitError: the probe's own error, of the same class.
        WorkerError: the process died; the message ends with the last of its standard error.
    """
    root = str(Path(compresskit.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryDirectory(prefix="compresskit-") as scratch:
        out = Path(scratch) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "compresskit.measure.probe"],
            input=json.dumps({**job, "probe": probe, "threads": threads, "out": str(out)}),
            env={**os.environ, **pinned, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not out.is_file():
            raise WorkerError(
                Fault(
                    f"the process that measures {probe}",
                    "exit code 0",
                    f"{done.returncode}; {done.stderr[-TAIL_CHARACTERS:]}",
                    "See the end of its output above; exit code -9 means that memory ran out.",
                )
            )
        answer: dict[str, Json] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return dict(answer["answer"])
