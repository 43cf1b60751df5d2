"""Two ranks of one launch on this machine, each a process that runs one of the scripts here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from compresskit.training.launch import _free_port

HERE = Path(__file__).parent
LIMIT_S = 900
"""Of one launch: several times what it takes on two idle cores, since tests may share them."""


@contextmanager
def two_ranks(script: ModuleType, place: Path) -> Iterator[None]:
    """``python SCRIPT PLACE`` as both ranks, while the body does what one process does; both end well."""
    port, ranks = str(_free_port()), []
    logs = [place / f"rank{rank}.log" for rank in range(2)]
    for rank, path in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        }
        with path.open("wb") as log:
            command = [sys.executable, str(script.__file__), str(place)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        yield
        codes = _codes(ranks)
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs)


def _codes(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """How they ended; once one has failed the other would wait for it in vain, and has no code."""
    end = time.monotonic() + LIMIT_S
    codes = [rank.poll() for rank in ranks]
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
    return codes
