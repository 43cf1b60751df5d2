"""Which machines take part in a launch: from the command line, or from Slurm's variables. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from compresskit.errors import Fault, InputError
from compresskit.training.setting import NOTES, launched_processes

RDZV_TIMEOUT_S = 600
SLURM_PORTS = (29400, 8192)
"""First port of a Slurm job's rendezvous, and how many there are to choose from by the job's number."""
MAX_RESTARTS = "COMPRESSKIT_MAX_RESTARTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A launch as one of its machines sees it.

    Attributes:
        nnodes: machines that take part.
        node_rank: of this machine; number 0 keeps the rendezvous.
        rdzv: ``HOST:PORT`` of machine 0, where all meet.
        processes: training processes that each machine starts.
        max_restarts: how often processes are started again after one is lost.
        rdzv_timeout_s: seconds to wait for all machines, also for one that comes back.
        run_id: tells one launch from another at the same address.
    """

    nnodes: int = 1
    node_rank: int = 0
    rdzv: str = "127.0.0.1:0"
    processes: int = 1
    max_restarts: int = 0
    rdzv_timeout_s: int = RDZV_TIMEOUT_S
    run_id: str = "compresskit"


def machines_of(
    given: Mapping[str, int | str | None], processes: int, environment: Mapping[str, str]
) -> Machines | None:
    """The machines that were asked for; None to run in this process, which may start others here.

    Args:
        given: option -> value: ``nnodes``, ``node_rank``, ``rdzv``, ``nproc``, ``max_restarts``,
            ``rdzv_timeout``; None, or nothing, was not typed.
        processes: training processes on each machine where ``nproc`` does not say it.
        environment: of this process; under ``srun`` on several machines it has all that is needed.

    Raises:
        InputError: what was typed does not make a launch; all faults together.
    """
    typed = {name: value for name, value in given.items() if value is not None}
    places = {"nnodes", "node_rank", "rdzv", "nproc", "rdzv_timeout"} & typed.keys()
    if launched_processes() is not None:
        if typed and NOTES not in environment:
            got = f"{', '.join(_flag(name) for name in sorted(typed))} in a launch of another tool's"
            cure = "Leave them out here, and give torchrun or accelerate launch its own."
            raise InputError(Fault("launch", "one launcher", got, cure))
        return None
    slurm = {} if {"nnodes", "rdzv"} & typed.keys() else _of_slurm(environment)
    if not places and not slurm:
        return None
    fields = {**slurm, **typed}
    faults = _faults(fields)
    if faults:
        raise InputError(*faults)
    nproc = fields.pop("nproc", processes)
    timeout_s = fields.pop("rdzv_timeout", RDZV_TIMEOUT_S)
    return Machines(processes=nproc, rdzv_timeout_s=timeout_s, **fields)  # type: ignore[arg-type]


def _faults(fields: Mapping[str, int | str]) -> list[Fault]:
    """What is wrong with the options of a launch."""
    faults = []
    for name, least in {
        "nnodes": 1,
        "node_rank": 0,
        "nproc": 1,
        "max_restarts": 0,
        "rdzv_timeout": 1,
    }.items():
        if int(fields.get(name, least)) < least:
            faults.append(Fault(_flag(name), f"at least {least}", str(fields[name]), f"Raise {_flag(name)}."))
    nnodes, rank, rdzv = int(fields.get("nnodes", 1)), fields.get("node_rank"), fields.get("rdzv")
    if nnodes > 1 and rank is None:
        cure = "Number the machines from 0, and give each its own; machine 0 is the one that --rdzv names."
        faults.append(Fault("--node-rank", f"0 to {nnodes - 1}", "none", cure))
    if rank is not None and int(rank) >= nnodes:
        cure = "Number the machines from 0, and give --nnodes on each."
        faults.append(Fault("--node-rank", f"less than {nnodes}, which --nnodes says", str(rank), cure))
    if rdzv is None and nnodes > 1:
        cure = "Name machine 0 as the others reach it, and a free port, on all alike: --rdzv node-a:29400."
        faults.append(Fault("--rdzv", "HOST:PORT of machine 0", "none", cure))
    if rdzv is not None and not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):\d{1,5}", str(rdzv)):
        faults.append(Fault("--rdzv", "HOST:PORT", str(rdzv), "Write it as node-a:29400."))
    return faults


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _of_slurm(environment: Mapping[str, str]) -> dict[str, int | str]:
    """The launch of a step that ``srun`` started on several machines; nothing outside of one.

    A batch script has variables of the same names before it calls ``srun``, but no number of a step.

    Raises:
        InputError: it has several tasks on a machine.
    """
    if "SLURM_STEP_ID" not in environment:
        return {}
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", str(nodes)))
    if nodes < 2:
        return {}
    if tasks != nodes:
        cure = "Use srun --ntasks-per-node=1; --nproc says how many processes each machine starts."
        raise InputError(Fault("srun", f"one task on each of {nodes} machines", f"{tasks} tasks", cure))
    names = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job = environment.get("SLURM_JOB_ID", "0")
    port = SLURM_PORTS[0] + int(job) % SLURM_PORTS[1]
    rank = int(environment["SLURM_NODEID"])
    run_id = f"slurm-{job}-{environment['SLURM_STEP_ID']}"
    return {"nnodes": nodes, "node_rank": rank, "rdzv": f"{first_host(names)}:{port}", "run_id": run_id}


def unused_machines(environment: Mapping[str, str]) -> str | None:
    """What to tell a user whose Slurm job has machines that a command outside of ``srun`` does not use."""
    nodes = int(environment.get("SLURM_NNODES", "1"))
    if nodes < 2 or "SLURM_STEP_ID" in environment:
        return None
    return (
        f"This job has {nodes} machines and the command runs on one of them: start it with srun to use all."
    )


def first_host(names: str) -> str:
    """The first of Slurm's list of hosts: ``gpu[07-09,12],login`` gives ``gpu07``."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", names)
    host = head[0] if head else names
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", host)


def max_restarts() -> int:
    """How often processes of our own are started again on this machine after one is lost."""
    said = os.environ.get(MAX_RESTARTS, "0")
    if not said.isdigit():
        raise InputError(Fault(MAX_RESTARTS, "a whole number, 0 or more", repr(said), "Set it to one."))
    return int(said)
