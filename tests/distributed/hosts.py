"""Two "hosts" on one machine: network namespaces with a cable between them, each with a name of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Host:
    """One of them.

    Attributes:
        space: its network namespace.
        name: that its processes see.
        address: of its end of the cable.
        cable: name of that end.
        running: what was started on it.
    """

    space: str
    name: str
    address: str
    cable: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, place: Path, log: Path, *arguments: str, changes: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """``compresskit ARGUMENTS`` in ``place``; what it says is added to ``log``."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        command = ["ip", "netns", "exec", self.space, *named, sys.executable, "-m", "compresskit", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(changes or {})
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=place, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.running.append(process)
        return process

    def plug(self, state: str) -> None:
        """Put its end of the cable ``up`` or ``down``."""
        ip("-n", self.space, "link", "set", self.cable, state)

    def kill(self) -> None:
        """End all its processes at once, as a loss of power does."""
        for pid in ip("netns", "pids", self.space).split():
            os.kill(int(pid), signal.SIGKILL)
        for process in self.running:
            process.wait()
        self.running.clear()


def ip(*arguments: str) -> str:
    """What ``ip ARGUMENTS`` says."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, until the end of the block; skips where a user may not make them."""
    if not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("needs ip (iproute2), unshare and hostname")
    mark = f"ck{os.getpid()}"
    hosts = tuple(
        Host(f"{mark}{end}", f"host-{end}", f"10.231.0.{number}", f"{mark}{end}")
        for number, end in enumerate("ab", 1)
    )
    try:
        for host in hosts:
            ip("netns", "add", host.space)
        first, second = hosts
        ends = ["name", first.cable, "netns", first.space]
        ip("link", "add", *ends, "type", "veth", "peer", "name", second.cable, "netns", second.space)
    except subprocess.CalledProcessError as error:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.space], check=False, capture_output=True)
        pytest.skip(f"may not make network namespaces here: {error.stderr.strip()}")
    try:
        for host in hosts:
            ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", host.cable)
            ip("-n", host.space, "link", "set", "lo", "up")
            host.plug("up")
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            ip("netns", "del", host.space)
