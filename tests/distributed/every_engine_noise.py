"""Batches that grow with the noise of gradients, under each engine that can measure it, in one launch.

``python every_engine_noise.py OUT`` is one rank; see ``train_everywhere``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES, FIELDS, broken_off, make_model
from ranks import Trained, train_everywhere
from torch import Tensor

from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS, BREAK = 24, 23
GREW = {"1": 4, "21": 8}
RUNS = ("plain", "broken")
GROWING: Mapping[str, dict[str, Any]] = {name: ENGINES[name] for name in ("ddp", "fsdp")}
BATCH: dict[str, Any] = {
    "batch_size": 4,
    "micro_batch_size": 1,
    "adapt_batch": "noise",
    "largest_batch_size": 8,
    "learning_rate_scaling": "linear",
    "reference_batch_size": 4,
    "learning_rate": 1e-3,
    "steps": STEPS,
}


class Chance:
    """Rows that nothing can be learnt from: their gradients are all noise."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 48, (40, 12), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].clone()
        labels[: 1 + index % 7] = -100
        return {"input_ids": self.ids[index], "labels": labels, "position_ids": torch.arange(12)}


def train(place: Path, run: str, scratch: Path, saved: dict[str, Tensor], **changes: Any) -> Trained:
    """In one go, or ``broken`` off after the batch has grown and started again."""
    held: tuple[str, ...] = ()

    def start() -> TrainOutcome:
        nonlocal held
        model, held = make_model()
        rows = Chance()
        fields = replace(FIELDS, **{**BATCH, "checkpoint_every": 22 if run == "broken" else 0, **changes})
        options: Mapping[str, Any] = {"held": held, "device": "cpu", "validation": rows}
        return Run(model, rows, fields=fields, scratch=scratch, save=saved.update, **options).train()

    starting: Callable[[], TrainOutcome] = (lambda: broken_off(start, BREAK)) if run == "broken" else start
    return starting(), held


if __name__ == "__main__":
    train_everywhere(Path(sys.argv[1]), RUNS, GROWING, train)
