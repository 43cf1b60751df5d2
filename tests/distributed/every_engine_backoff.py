"""Memory that runs out on one rank alone, forward and backward, in the ranks of one launch.

``python every_engine_backoff.py OUT`` is one rank; each writes ``OUT/<run>-<rank>.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from every_engine import FIELDS, Counting, make_model

from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.setting import this_rank

STEPS = 6
RUNS: Mapping[str, dict[str, Any]] = {
    "forward": {"adapt_batch": "memory"},
    "backward": {"adapt_batch": "memory"},
    "fp16": {"adapt_batch": "memory", "precision": "fp16"},
    "never": {"adapt_batch": "memory"},
}
BATCH: dict[str, Any] = {"batch_size": 16, "micro_batch_size": 4, "steps": STEPS, "strategy": "ddp"}
AFTER, ROWS, SHORT_RANK = 5, 2, 1
"""Passes that memory is enough for at first, rows of a pass that it is enough for then, and on which rank."""


def train(run: str, scratch: Path, *, scarce: bool, **changes: Any) -> TrainOutcome:
    """With memory for ``ROWS`` rows after ``AFTER`` passes, where it is ``scarce``."""
    model, held = make_model()
    seen = []

    def short(tensor: torch.Tensor) -> None:
        seen.append(tensor)
        if scarce and len(seen) > AFTER and len(tensor) > ROWS:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def look(module: Any, _: Any, output: torch.Tensor) -> None:
        if run == "backward" and output.requires_grad:
            output.register_hook(short)
        elif module.training:
            short(output)

    model.model.layers[0].register_forward_hook(look)
    fields = replace(FIELDS, **{**RUNS[run], **BATCH, **changes})
    rows = Counting()
    return Run(model, rows, fields=fields, scratch=scratch, validation=rows, held=held, device="cpu").train()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = this_rank()
    for run in RUNS:
        outcome = train(run, out / run, scarce=run != "never" and rank == SHORT_RANK)
        (out / f"{run}-{rank}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
