"""compresskit at the task of ``benchmarks.distill_peer``: the training that ``compresskit distill`` does.

python benchmarks/peers/compresskit_distill.py TASK.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from distill_task import LEARNING_RATE, MAX_GRAD_NORM, run
from torch import Tensor

from compresskit.distill.divergences import Divergences
from compresskit.distill.teacher import Replica
from compresskit.modeling import load_model
from compresskit.training.fields import TrainingFields
from compresskit.training.run import Run


class InOrder:
    """Rows as they lie: the trainer's own order, undone."""

    def __init__(self, ids_RT: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(len(ids_RT), generator=generator)
        self._ids_RT = torch.empty_like(ids_RT)
        self._ids_RT[place] = ids_RT

    def __len__(self) -> int:
        return len(self._ids_RT)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        ids = self._ids_RT[index]
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(len(ids))}


def train(task: dict[str, Any], ids: Tensor) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    steps, batch, tokens = ids.shape
    model = load_model(Path(task["student"]))
    teacher = Replica(directory=task["teacher"], vocabulary=model.config.vocab_size)
    teacher.load()
    fields = TrainingFields(
        steps=steps,
        batch_size=batch,
        context_length=tokens,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        max_grad_norm=MAX_GRAD_NORM,
        checkpoint_every=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = InOrder(ids.flatten(0, 1), seed=0)
        Run(
            model, rows, fields=fields, scratch=Path(scratch), objective=Divergences(), teacher=teacher
        ).train()
        lines = Path(scratch, "losses.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    ends = [0.0, *(line["seconds"] for line in logged)]
    return [b - a for a, b in pairwise(ends)], [line["loss"] for line in logged]


if __name__ == "__main__":
    run(train, ("torch", "transformers", "accelerate"))
