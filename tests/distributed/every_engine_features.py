"""Feature losses under every engine, one after another, in the ranks of one launch.

``python every_engine_features.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment.
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
from every_engine import FIELDS, Counting
from ranks import Trained, train_everywhere
from torch import Tensor

from compresskit.distill.features import WithFeatures
from compresskit.distill.teacher import Replica
from compresskit.modeling import load_model
from compresskit.training.run import Run

VOCABULARY, STEPS = 48, 10
FORWARD_KL = {"target": "compresskit.distill.divergences:Divergences", "options": {}}
HALF: Mapping[str, Any] = {"weight": 0.5}
RUNS: Mapping[str, dict[str, Any]] = {
    "wide": {"features": [{"method": "squarehead", "pairs": ((0, 1), (1, 3)), "options": HALF}]},
    "narrow": {
        "features": [
            {"method": "hidden_mse", "pairs": ((1, 3),), "options": HALF},
            {"method": "relation", "pairs": ((1, 3), (0, 1))},
            {"method": "hidden_cosine", "pairs": ((1, 3), (0, 3)), "options": HALF},
        ],
        "widths": (16, 32),
    },
}
"""A student as wide as its teacher, and one half as wide, of which several losses compare the same blocks and
share projections, which train along."""
ENGINES: Mapping[str, dict[str, Any]] = PLAIN | {
    f"{engine}-again": {**PLAIN[engine], "activation_checkpointing": True} for engine in ("fsdp", "zero3")
}


def train(place: Path, run: str, scratch: Path, saved: dict[str, Tensor], **changes: Any) -> Trained:
    """Train the student of ``run``, whose zeros are held; returns the outcome and whose they are."""
    model = load_model(place / run)
    held = tuple(name for name, _ in model.named_modules() if name.endswith("proj"))
    with torch.no_grad():
        for name in held:
            model.get_submodule(name).weight[:, ::2] = 0
    objective = WithFeatures(objective=FORWARD_KL, **RUNS[run])
    looks = objective.looks_at_teacher
    teacher = Replica(
        directory=str(place / "teacher"),
        vocabulary=VOCABULARY,
        blocks=looks.outputs,
        attended=looks.attended,
    )
    teacher.load()
    outcome = Run(
        model,
        Counting(),
        fields=replace(FIELDS, steps=STEPS, **changes),
        scratch=scratch,
        objective=objective,
        teacher=teacher,
        validation=Counting(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()
    return outcome, held


if __name__ == "__main__":
    train_everywhere(Path(sys.argv[1]), RUNS, ENGINES, train)
