"""A teacher divided among the ranks, under every engine of the student, in the ranks of one launch.

``python every_engine_teachers.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment.
The models are in ``OUT``; it writes ``OUT/<run>-<engine>-<rank>.json`` there. Imported, it gives the training
to compare with.
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
from every_engine import ENGINES, FIELDS, Counting

from compresskit.distill.divergences import Divergences
from compresskit.distill.divided import Divided
from compresskit.distill.features import WithFeatures
from compresskit.distill.few_bits import FewBits
from compresskit.distill.placements.few_bits import rounded_layers
from compresskit.modeling import ModelSource, load_model
from compresskit.training.objective import TeacherProvider
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

VOCABULARY, STEPS = 48, 10
LOSS = {"losses": [("forward_kl", {}), ("reverse_kl", {"weight": 0.5})], "temperature": 2.0}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "tied": {"blocks": (1, 3)},
    "untied": {"blocks": ()},
    "bf16": {"blocks": (), "dtype": "bfloat16"},
    "4bit": {"blocks": (1, 3), "base": "nf4"},
}
"""Of the teacher: which of its blocks are compared, and what it is held in."""
TEACHERS = {"tied": "tied", "untied": "untied", "bf16": "untied", "4bit": "tied"}
WHOLE = ("4bit",)
"""Runs whose teacher is whole in each rank."""


def teacher_of(place: Path, run: str, kind: type[Any]) -> Any:
    """A provider of this class, or of that of a teacher in few bits."""
    options: dict[str, Any] = {"directory": str(place / TEACHERS[run]), "vocabulary": VOCABULARY, **RUNS[run]}
    if "base" in options:
        return FewBits(**options, layers=rounded_layers(ModelSource(place / TEACHERS[run]).anatomy))
    return kind(**options)


def train(place: Path, run: str, scratch: Path, teacher: TeacherProvider, **changes: Any) -> TrainOutcome:
    """Train the student with this teacher."""
    model = load_model(place / "student")
    objective: Any = Divergences(**LOSS)
    if blocks := RUNS[run]["blocks"]:
        inner = {"target": "compresskit.distill.divergences:Divergences", "options": LOSS}
        pairs = tuple(enumerate(blocks))
        objective = WithFeatures(objective=inner, features=[{"method": "squarehead", "pairs": pairs}])
    teacher.load()
    return Run(
        model,
        Counting(),
        fields=replace(FIELDS, steps=STEPS, **changes),
        scratch=scratch,
        objective=objective,
        teacher=teacher,
        validation=Counting(),
        device="cpu",
    ).train()


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine, changes in ENGINES.items():
        for run in RUNS:
            teacher = teacher_of(place, run, Divided)
            outcome = train(place, run, place / f"{run}-{engine}-s", teacher, **changes)
            said = asdict(outcome)
            if run not in WHOLE:
                parameters: list[Any] = list(teacher.model(torch.device("cpu")).parameters())
                said["teacher_bytes"] = sum(p.to_local().untyped_storage().nbytes() for p in parameters)
                said["learns"] = any(p.requires_grad for p in parameters)
            name = f"{run}-{engine}-{torch.distributed.get_rank()}.json"
            (place / name).write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
