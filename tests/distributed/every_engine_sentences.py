"""Losses on sentences under every engine, one after another, in the ranks of one launch.

``python every_engine_sentences.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment.
The models are in ``OUT``; it writes ``OUT/<run>-<engine>.json`` and ``.safetensors`` there. Imported, it
gives the training to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES as PLAIN
from every_engine import FIELDS
from ranks import Trained, train_everywhere
from torch import Tensor, nn

from compresskit.distill.features import WithFeatures
from compresskit.distill.sentence_teacher import SentenceReplica
from compresskit.distill.sentences import SentenceLosses
from compresskit.modeling import load_model
from compresskit.training.features import Looks
from compresskit.training.run import Run

STEPS, ROWS, CLASSES = 10, 42, 3
"""So many rows that the last batch of an evaluation is one rank's alone."""
PAIRS = ((0, 1), (1, 2))
EMBEDDINGS = {"losses": [("embedding_cosine", {}), ("pairwise", {"weight": 2.0})], "widths": (16, 32)}
RUNS: Mapping[str, Any] = {
    "encoder": WithFeatures(
        objective={"target": "compresskit.distill.sentences:SentenceLosses", "options": EMBEDDINGS},
        features=[{"method": "relation", "options": {"weight": 0.5}, "pairs": PAIRS}],
    ),
    "classifier": SentenceLosses(losses=[("class_logits", {})], temperature=2.0, cross_entropy_weight=0.25),
}
"""A narrow encoder whose pooler no gradient reaches, and a classifier."""
ENGINES: Mapping[str, dict[str, Any]] = {name: PLAIN[name] for name in ("ddp", "fsdp", "zero3")}
ENGINES = ENGINES | {"fsdp-again": {**PLAIN["fsdp"], "activation_checkpointing": True}}


class Sentences:
    """Rows of many lengths, so that ranks pad to different ones; every fifth has no class."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        words = 4 + (7 * index + 5 * torch.arange(3 + index % 6)) % 60
        ids = torch.cat([torch.tensor([2]), words, torch.tensor([3])])
        label = -100 if index % 5 == 4 else index % CLASSES
        return {"input_ids": ids, "token_type_ids": (torch.arange(len(ids)) > 3).long(), "label": label}


def train(place: Path, run: str, scratch: Path, saved: dict[str, Tensor], **changes: Any) -> Trained:
    """Train the student of ``run``, whose zeros are held; returns the outcome and whose they are."""
    model = load_model(place / run)
    held = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    held = tuple(name for name in held if "classifier" not in name)
    with torch.no_grad():
        for name in held:
            model.get_submodule(name).weight[:, ::2] = 0
    objective = RUNS[run]
    reads = getattr(objective, "inner", objective).reads
    looks = getattr(objective, "looks_at_teacher", Looks())
    teacher = SentenceReplica(
        directory=str(place / f"{run}-teacher"),
        reads=reads,
        blocks=looks.outputs,
        attended=looks.attended,
    )
    teacher.load()
    outcome = Run(
        model,
        Sentences(),
        fields=replace(FIELDS, steps=STEPS, **changes),
        scratch=scratch,
        objective=objective,
        teacher=teacher,
        validation=Sentences(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()
    return outcome, held


if __name__ == "__main__":
    train_everywhere(Path(sys.argv[1]), RUNS, ENGINES, train)
