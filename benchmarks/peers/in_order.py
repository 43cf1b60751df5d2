"""Training by compresskit's own trainer on rows in a given order: our side of comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from distill_task import LEARNING_RATE, MAX_GRAD_NORM
from torch import Tensor, nn

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


def trained(
    task: Mapping[str, Any], model: nn.Module, ids: Tensor, **parts: Any
) -> tuple[list[float], list[float]]:
    """Train on ``ids`` (steps, batch, tokens).

    Args:
        task: with changes of the fields, if any; all ranks write beside its answer.
        model: in place.
        ids: of every step.
        parts: further ones of the run, such as ``objective`` and ``teacher``.

    Returns:
        Seconds and loss of each step.
    """
    steps, batch, tokens = ids.shape
    fields = TrainingFields(
        steps=steps,
        batch_size=batch,
        context_length=tokens,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_fraction=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        checkpoint_every=0,
        **task.get("fields", {}),
    )
    scratch = Path(task["answer"]).parent / "scratch"
    Run(model, InOrder(ids.flatten(0, 1), seed=0), fields=fields, scratch=scratch, **parts).train()
    logged = [json.loads(line) for line in (scratch / "losses.jsonl").read_text().splitlines()]
    ends = [0.0, *(line["seconds"] for line in logged)]
    return [b - a for a, b in pairwise(ends)], [line["loss"] for line in logged]
