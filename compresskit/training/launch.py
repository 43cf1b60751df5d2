"""Start training processes on this machine; they live and die together, and the first failure is told."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from compresskit import errors
from compresskit.errors import CompressKitError, Fault, WorkerError
from compresskit.training.rules import this_rank

JOB = "job.json"
POLL_S = 0.1
GRACE_S = 10.0
TRACEBACK_LINES = 30
PR_SET_PDEATHSIG = 1


def launch(job: str, processes: int, scratch: Path) -> None:
    """Run ``compresskit.training.worker`` on ``job`` in ``processes`` ranks and wait for them.

    Args:
        job: a TrainJob as JSON.
        processes: how many.
        scratch: for the job file, the logs of ranks above 0 and what a failing rank leaves.

    Raises:
        CompressKitError: the error of the rank that failed first, as it raised it.
        WorkerError: that rank raised something else, or was killed.
    """
    for old in scratch.glob("failure-*.json"):
        old.unlink()
    path = scratch / JOB
    path.write_text(job, encoding="utf-8")
    port = _free_port()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            workers.append(_start(rank, processes, port, path, scratch))
        _wait(workers)
    finally:
        _end(workers)
    failed = [(rank, w.returncode) for rank, w in enumerate(workers) if w.returncode]
    if failed:
        raise _failure(scratch, failed)


def _start(rank: int, processes: int, port: int, job: Path, scratch: Path) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    ours = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **{k: str(v) for k, v in ours.items()}}
    paths = [str(Path(errors.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, "-m", "compresskit.training.worker", str(job)]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with (scratch / f"worker-{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed."""
    while any(w.poll() is None for w in workers):
        if any(w.returncode for w in workers):
            return
        time.sleep(POLL_S)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """End those still alive: politely, then for sure."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _failure(scratch: Path, failed: list[tuple[int, int]]) -> CompressKitError:
    """The error to raise for ranks that ended badly."""
    notes = [json.loads(p.read_text(encoding="utf-8")) for p in scratch.glob("failure-*.json")]
    if not notes:
        rank, code = next(((r, c) for r, c in failed if c != -signal.SIGTERM), failed[0])
        got = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
        cure = "Look for the out-of-memory killer in the system log; the same command continues the run."
        return WorkerError(Fault(f"training process {rank}", "a normal end", got, cure))
    first = min(notes, key=lambda note: float(note["time"]))
    kind = getattr(errors, first["error"], None)
    if isinstance(kind, type) and issubclass(kind, CompressKitError):
        return kind(*(Fault(**f) if isinstance(f, dict) else f for f in first["faults"]))
    where = f"training process {first['rank']} of {first['processes']}"
    lines = "\n".join(first["traceback"].splitlines()[-TRACEBACK_LINES:])
    return WorkerError(f"{where} failed; its traceback:\n{lines}")


def note_failure(error: BaseException, scratch: Path) -> None:
    """Leave what the parent needs to tell of ``error``; called by the rank that raised it."""
    faults = error.faults if isinstance(error, CompressKitError) else ()
    rank = this_rank()
    note: dict[str, Any] = {
        "time": time.time(),
        "rank": rank,
        "processes": int(os.environ["WORLD_SIZE"]),
        "error": type(error).__name__ if isinstance(error, CompressKitError) else "",
        "faults": [_plain(f) for f in faults],
        "traceback": "".join(traceback.format_exception(error)),
    }
    (scratch / f"failure-{rank}.json").write_text(json.dumps(note), encoding="utf-8")


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux only).

    Otherwise a killed parent would leave ranks training on, and the next start would write beside them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _plain(fault: Fault | str) -> dict[str, str] | str:
    if isinstance(fault, str):
        return fault
    return {name: getattr(fault, name) for name in ("where", "expected", "got", "cure")}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
