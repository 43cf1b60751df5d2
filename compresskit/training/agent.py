"""Start this very command in several processes on each of several machines, by torch's elastic agent.

Each machine runs one agent. The agents meet at machine 0, give out ranks, start their processes, and start
all of them again, as often as they may, when one is lost. In the processes everything is as under torchrun.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousTimeoutError,
    registry,
)

from compresskit.errors import CompressKitError, Fault, PlanError, WorkerError
from compresskit.timing import usable_cores
from compresskit.training.faults import crowd_faults
from compresskit.training.launch import clear_notes, failure_of, is_worth_a_restart, threads_each
from compresskit.training.machines import Machines
from compresskit.training.setting import NOTES, PARENT

READ_S = 30
"""Seconds after which machine 0 is lost to the others."""
MONITOR_S = 0.5
CLOSED_S = 15.0
"""Seconds that processes have to end by themselves, with an error of their own, once another machine has."""


class _Agent(LocalElasticAgent):
    """The elastic agent, which starts nothing again that would fail again, and says what it does."""

    notes: Path
    closed_at: float | None = None

    def _monitor_workers(self, worker_group: Any) -> Any:
        """Also end when another machine has ended the launch, and the processes here do not notice."""
        result = super()._monitor_workers(worker_group)
        handler = worker_group.spec.rdzv_handler
        if result.state == WorkerState.HEALTHY and handler.is_closed():
            self.closed_at = self.closed_at or time.monotonic()
            if time.monotonic() - self.closed_at > CLOSED_S:
                raise RendezvousClosedError
        return result

    def _restart_workers(self, worker_group: Any) -> None:
        error = failure_of(self.notes, [])
        if error is not None and not is_worth_a_restart(error):
            raise error
        why = f" ({error})" if error is not None else ""
        print(
            f"Training processes start again{why}; they continue where they can.", file=sys.stderr, flush=True
        )
        clear_notes(self.notes)
        super()._restart_workers(worker_group)


def run_on(machines: Machines, arguments: list[str], *, device: str = "auto") -> None:
    """Run ``python -m compresskit ARGUMENTS`` as this machine's processes of the launch, and wait for them.

    Args:
        machines: of the launch; one agent on each calls this with its own ``node_rank``.
        arguments: of the command.
        device: that the processes will use: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.

    Raises:
        PlanError: this machine has too few devices, or cores, for its processes; none was started.
        CompressKitError: the error of the process here that failed first.
        WorkerError: a process was killed, machines did not meet in time, or machine 0 was lost.
    """
    _require_room(machines.processes, device)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    address = _own_address(machines)
    _set_up(machines, address)
    with tempfile.TemporaryDirectory(prefix="compresskit-launch-") as place:
        notes = Path(place)
        os.environ |= {NOTES: str(notes), PARENT: str(os.getpid())}
        try:
            _run_again(machines, arguments, address, notes)
        except (RendezvousTimeoutError, RendezvousConnectionError, RendezvousClosedError) as error:
            raise failure_of(notes, []) or _not_met(machines, error) from error
        except SignalException as error:
            raise WorkerError(f"The launch was ended by signal {error.sigval.name}.") from error
        finally:
            del os.environ[NOTES], os.environ[PARENT]


def _require_room(processes: int, device: str) -> None:
    """PlanError where this machine cannot be meant to have so many processes."""
    devices = torch.cuda.device_count()
    kind = "cuda" if devices and device != "cpu" else "cpu"  # without transformers, which no agent needs
    faults = crowd_faults(processes, "--nproc", device=kind, devices=devices, cores=usable_cores())
    if faults:
        raise PlanError(*faults)


def _run_again(machines: Machines, arguments: list[str], address: str, notes: Path) -> None:
    """Run one agent; another one when machine 0, where they meet, is lost and may come back."""
    for left in range(machines.max_restarts, -1, -1):
        try:
            return _run(replace(machines, max_restarts=left), arguments, address, notes)
        except RendezvousConnectionError:
            if machines.node_rank == 0 or not left:
                raise
            clear_notes(notes)
            print("Machine 0 was lost; waiting for it to come back.", file=sys.stderr, flush=True)


def _handler(machines: Machines, address: str) -> Any:
    """The rendezvous, as soon as machine 0 keeps one."""
    deadline = time.monotonic() + machines.rdzv_timeout_s
    while True:
        try:
            return registry.get_rendezvous_handler(_parameters(machines, address))
        except RendezvousConnectionError:
            if machines.node_rank == 0 or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _parameters(machines: Machines, address: str) -> RendezvousParameters:
    return RendezvousParameters(
        backend="c10d",
        endpoint=machines.rdzv,
        run_id=machines.run_id,
        min_nodes=machines.nnodes,
        max_nodes=machines.nnodes,
        local_addr=address,
        is_host=machines.node_rank == 0,
        join_timeout=machines.rdzv_timeout_s,
        read_timeout=min(READ_S, machines.rdzv_timeout_s),
    )


def _run(machines: Machines, arguments: list[str], address: str, notes: Path) -> None:
    """One agent from the first rendezvous to the end of its processes."""
    handler = _handler(machines, address)
    quiet = {rank: Std.ALL for rank in range(1, machines.processes)}
    spec = WorkerSpec(
        role="compresskit",
        local_world_size=machines.processes,
        entrypoint=sys.executable,
        args=("-m", "compresskit", *arguments),
        rdzv_handler=handler,
        max_restarts=machines.max_restarts,
        monitor_interval=MONITOR_S,
        local_addr=address,
    )
    agent = _Agent(spec, DefaultLogsSpecs(log_dir=str(notes / "logs"), redirects=quiet), start_method="spawn")
    agent.notes = notes
    closes = True
    try:
        result = agent.run()
        if result.is_failed():
            failed = [(rank, failure.exitcode) for rank, failure in sorted(result.failures.items())]
            raise failure_of(notes, failed) or WorkerError("A training process failed.")
    except (SignalException, RendezvousConnectionError):
        closes = False  # this machine, or machine 0, may come back
        raise
    finally:
        if closes:
            handler.shutdown()


def _set_up(machines: Machines, address: str) -> None:
    """What the processes inherit."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
        "1"  # a fresh store for each start: nothing stale in it
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(machines.processes)))
    if machines.nnodes > 1 and not ip_address(address).is_loopback:
        # Else gloo takes the address of the host's name, which many hosts file as 127.0.1.1.
        for name, ends in psutil.net_if_addrs().items():
            if any(end.address == address for end in ends):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _own_address(machines: Machines) -> str:
    """Of this machine, as it is seen from machine 0; nothing is sent."""
    host, _, port = machines.rdzv.rpartition(":")
    try:
        family, kind, _, _, end = socket.getaddrinfo(
            host.strip("[]"), int(port) or 1, type=socket.SOCK_DGRAM
        )[0]
        with closing(socket.socket(family, kind)) as probe:
            probe.connect(end)
            return str(probe.getsockname()[0])
    except OSError as error:
        cure = "Name machine 0 as this machine reaches it, by its address if names are not known here."
        raise WorkerError(
            Fault(f"--rdzv {machines.rdzv}", "a host that can be reached", str(error), cure)
        ) from error


def _not_met(machines: Machines, error: Exception) -> CompressKitError:
    """Why the machines are not together."""
    where = f"--rdzv {machines.rdzv}, machine {machines.node_rank} of {machines.nnodes}"
    if isinstance(error, RendezvousClosedError):
        cure = "See the error of the machine that stopped first, then start all of them again."
        return WorkerError(
            Fault(where, "all machines at work", "the end of the launch, by another one", cure)
        )
    if isinstance(error, RendezvousTimeoutError):
        expected = f"{machines.nnodes} machines within {machines.rdzv_timeout_s} s"
        got = str(machines.nnodes - 1) if machines.nnodes == 2 else "fewer"
        cure = "Start the same command on each with its own --node-rank, or raise --rdzv-timeout."
        return WorkerError(Fault(where, expected, got, cure))
    cure = (
        "See whether machine 0 runs, and whether its port is free and open to this machine; start all again."
    )
    return WorkerError(Fault(where, "an answer of machine 0", "none", cure))
