"""Start training processes on this machine; they live and die together, and the first failure is told."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compresskit import errors
from compresskit.errors import CompressKitError, Fault, RunError, WorkerError
from compresskit.training.machines import max_restarts
from compresskit.training.setting import NOTES, PARENT, this_rank

JOB = "job.json"
WORKER = "compresskit.training.worker"
POLL_S = 0.1
GRACE_S = 10.0
TRACEBACK_LINES = 30
PR_SET_PDEATHSIG = 1
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of errors that tell of a disk, or a share of it, that takes no more."""


def launch(job: str, processes: int, scratch: Path, *, module: str = WORKER) -> None:
    """Run ``module`` on ``job`` in ``processes`` ranks and wait for them.

    When one is lost all end, and start again as often as ``max_restarts`` says, where a checkpoint lets them.

    Args:
        job: a TrainJob as JSON.
        processes: how many.
        scratch: for the job file, the logs of ranks above 0 and what a failing rank leaves.
        module: that each rank runs, given the path of the job file.

    Raises:
        CompressKitError: the error of the rank that failed first, as it raised it.
        WorkerError: that rank raised something else, or was killed.
    """
    path = scratch / JOB
    path.write_text(job, encoding="utf-8")
    for left in range(max_restarts(), -1, -1):
        clear_notes(scratch)
        error = _run(path, processes, scratch, module)
        if error is None:
            return
        if not left or not is_worth_a_restart(error):
            raise error
        print(f"{error}\nThe {processes} training processes start again.", file=sys.stderr, flush=True)


def _run(job: Path, processes: int, scratch: Path, module: str) -> CompressKitError | None:
    """Start all, wait for all; the error of the first that failed."""
    port = _free_port()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            workers.append(_start(rank, processes, port, job, scratch, module))
        _wait(workers)
        failed = [(rank, w.returncode) for rank, w in enumerate(workers) if w.returncode]
    finally:
        _end(workers)
    return failure_of(scratch, failed)


def is_worth_a_restart(error: CompressKitError) -> bool:
    """Whether the same processes might do better: one was lost, or failed in a way we do not know."""
    return isinstance(error, WorkerError)


def threads_each(processes: int) -> int:
    """Threads of one process, where so many share this machine."""
    return max(1, (os.cpu_count() or 1) // processes)


def _start(
    rank: int, processes: int, port: int, job: Path, scratch: Path, module: str
) -> subprocess.Popen[bytes]:
    ours = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        NOTES: scratch,
        PARENT: os.getpid(),
    }
    environment = {
        "OMP_NUM_THREADS": str(threads_each(processes)),
        **os.environ,
        **{k: str(v) for k, v in ours.items()},
    }
    paths = [str(Path(errors.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, "-m", module, str(job)]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with (scratch / f"worker-{rank}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _wait(workers: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed."""
    codes = [worker.poll() for worker in workers]
    while None in codes and not any(codes):
        time.sleep(POLL_S)
        codes = [worker.poll() for worker in workers]


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


def failure_of(scratch: Path, failed: Sequence[tuple[int, int]]) -> CompressKitError | None:
    """The error to raise for processes that ended badly; None if none did.

    Args:
        scratch: where they noted why.
        failed: rank and exit status, below 0 a signal, of each that did not end well.
    """
    notes = [json.loads(p.read_text(encoding="utf-8")) for p in scratch.glob("failure-*.json")]
    killed = [(rank, code) for rank, code in failed if code < 0 and code != -signal.SIGTERM]
    if not notes or (killed and all(note["error"] == WorkerError.__name__ for note in notes)):
        if not failed:
            return None
        rank, code = (killed or list(failed))[0]
        got = _signal_named(-code) if code < 0 else f"exit status {code}"
        cure = "Look for the out-of-memory killer in the system log; the same command continues the run."
        return WorkerError(Fault(f"training process {rank}", "a normal end", got, cure))
    first = min(notes, key=lambda note: float(note["time"]))
    kind = getattr(errors, first["error"], None)
    if isinstance(kind, type) and issubclass(kind, CompressKitError):
        return kind(*(Fault(**f) if isinstance(f, dict) else f for f in first["faults"]))
    where = f"training process {first['rank']} of {first['processes']}"
    lines = "\n".join(first["traceback"].splitlines()[-TRACEBACK_LINES:])
    return WorkerError(f"{where} failed; its traceback:\n{lines}")


def _signal_named(number: int) -> str:
    """``signal 9 (SIGKILL)``; most real-time signals have no name."""
    named = number in [known.value for known in signal.Signals]
    return f"signal {number} ({signal.Signals(number).name})" if named else f"signal {number}"


def clear_notes(scratch: Path) -> None:
    """Forget why processes failed before."""
    for old in scratch.glob("failure-*.json"):
        old.unlink()


def noted_in() -> Path | None:
    """Where the parent that started this process looks for notes of failures; None without one of ours."""
    return Path(os.environ[NOTES]) if NOTES in os.environ else None


def note_failure(error: BaseException) -> None:
    """Leave what the parent needs to tell of ``error``, if it is ours; called by the rank that raised it."""
    if (scratch := noted_in()) is None:
        return
    rank = this_rank()
    if isinstance(error, OSError) and error.errno in FULL:  # which a restart would find again
        cure = "Free some disk, or choose another place; the same command continues the run."
        error = RunError(Fault(f"training process {rank}", "room on the disk", str(error), cure))
    faults = error.faults if isinstance(error, CompressKitError) else ()
    note: dict[str, Any] = {
        "time": time.time(),
        "rank": rank,
        "processes": int(os.environ["WORLD_SIZE"]),
        "error": type(error).__name__ if isinstance(error, CompressKitError) else "",
        "faults": [_plain(f) for f in faults],
        "traceback": "".join(traceback.format_exception(error)),
    }
    partial = scratch / f"failure-{rank}.partial"
    try:
        partial.write_text(json.dumps(note), encoding="utf-8")
        os.replace(partial, scratch / f"failure-{rank}.json")
    except OSError:  # the disk that is full may be this one: then the log has it
        print(note["traceback"], file=sys.stderr)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux only).

    Otherwise a killed parent would leave ranks training on, and the next start would write beside them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = str(os.getppid())
        if os.environ.get(PARENT, parent) != parent:  # it ended before the kernel was asked
            os.kill(os.getpid(), signal.SIGKILL)


def _plain(fault: Fault | str) -> dict[str, str] | str:
    if isinstance(fault, str):
        return fault
    return {name: getattr(fault, name) for name in ("where", "expected", "got", "cure")}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
