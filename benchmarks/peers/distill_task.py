"""What the processes of ``distill_peer`` and ``training`` share; runs in a peer's environment too.

Nothing of this project is imported: only torch and what comes with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LEARNING_RATE, MAX_GRAD_NORM = 5e-4, 1.0


class Clock:
    """When each optimiser step was done, in seconds since the one before; begun before the first."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: list[float] = []

    def tick(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def run(
    train: Callable[[dict[str, Any], torch.Tensor], tuple[list[float], list[float]]], packages: Sequence[str]
) -> None:
    """Read the task that the command line names, do it, and write the answer, of a launch as its main rank.

    Args:
        train: from the task and its token ids (steps, batch, tokens) to seconds and loss of each step.
        packages: whose versions are told.
    """
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    seconds, losses = train(task, load_file(task["ids"])["input_ids"].long())
    if os.environ.get("RANK", "0") != "0":
        return
    answer = {"seconds": seconds, "losses": losses, "versions": {name: version(name) for name in packages}}
    Path(task["answer"]).write_text(json.dumps(answer))
