"""Training by compresskit's own trainer on rows in a given order: our side of comparisons."""

from __future__ import annotations

import json
import tempfile
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
    model: nn.Module, ids: Tensor, changes: Mapping[str, Any] | None = None, **parts: Any
) -> tuple[list[float], list[float]]:
    """Train on ``ids`` (steps, batch, tokens).

    Args:
        model: in place.
        ids: of every step.
        changes: of the fields.
        parts: further ones of the run, such as ``objective`` and ``teacher``.

    Returns:
        Seconds and loss of each step; empty on ranks but the main one.
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
        **(changes or {}),
    )
    with tempfile.TemporaryDirectory() as scratch:
        Run(model, InOrder(ids.flatten(0, 1), seed=0), fields=fields, scratch=Path(scratch), **parts).train()
        log = Path(scratch, "losses.jsonl")
        logged = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    ends = [0.0, *(line["seconds"] for line in logged)]
    return [b - a for a, b in pairwise(ends)], [line["loss"] for line in logged]
