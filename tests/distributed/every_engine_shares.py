"""Ranks of unlike speed, in one launch: each sleeps in its forward passes, one of them longer for a row.

``python every_engine_shares.py OUT`` is one rank; each writes ``OUT/<run>-<rank>.json``.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from every_engine import FIELDS, Counting, broken_off, make_model

from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.setting import this_rank

STEPS, CHECKPOINT, BREAK = 16, 14, 15
SLEEPS_S = {0: 0.02, 1: 0.08}
"""Of each rank, for a row."""
BATCH: dict[str, Any] = {"batch_size": 12, "micro_batch_size": 3, "steps": STEPS}
RUNS: Mapping[str, dict[str, Any]] = {
    "plain": {"shares": "measured", "strategy": "ddp"},
    "broken": {"shares": "measured", "strategy": "ddp", "checkpoint_every": CHECKPOINT, "workers": 1},
}


def train(run: str, scratch: Path, seen: list[int], *, sleep_s: float, **changes: Any) -> TrainOutcome:
    """``run``, each forward pass of which sleeps for each of its rows; their number goes to ``seen``."""

    def start() -> TrainOutcome:
        model, held = make_model()

        def slow(module: Any, *_: Any) -> None:
            if module.training:
                seen.append(len(_[-1]))
                time.sleep(sleep_s * seen[-1])

        model.model.layers[0].register_forward_hook(slow)
        fields, rows = replace(FIELDS, **{**BATCH, **changes}), Counting()
        options: dict[str, Any] = {"scratch": scratch, "validation": rows, "held": held, "device": "cpu"}
        return Run(model, rows, fields=fields, **options).train()

    return broken_off(start, BREAK) if run == "broken" else start()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = this_rank()
    for run, changes in RUNS.items():
        seen: list[int] = []
        outcome = train(run, out / run, seen, sleep_s=SLEEPS_S[rank], **changes)
        (out / f"{run}-{rank}.json").write_text(json.dumps({**asdict(outcome), "seen": seen}))
    outcome = train("ended", out / "broken", [], sleep_s=SLEEPS_S[rank], **RUNS["broken"])
    (out / f"ended-{rank}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
