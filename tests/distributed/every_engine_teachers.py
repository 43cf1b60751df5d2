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
from compresskit.modeling import load_model
from compresskit.training.fit import TrainOutcome, fit
from compresskit.training.objective import TeacherProvider

VOCABULARY, STEPS = 48, 10
LOSS = {"losses": [("forward_kl", {}), ("reverse_kl", {"weight": 0.5})], "temperature": 2.0}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "tied": {"blocks": (1, 3)},
    "untied": {"blocks": ()},
    "bf16": {"blocks": (), "dtype": "bfloat16"},
}
"""Of the teacher: whether its head is its embedding, which of its blocks are compared, and its type."""
TEACHERS = {"tied": "tied", "untied": "untied", "bf16": "untied"}


def options_of(place: Path, run: str) -> dict[str, Any]:
    return {"directory": str(place / TEACHERS[run]), "vocabulary": VOCABULARY, **RUNS[run]}


def train(place: Path, run: str, scratch: Path, teacher: TeacherProvider, **changes: Any) -> TrainOutcome:
    """Train the student with this teacher."""
    model = load_model(place / "student")
    objective: Any = Divergences(**LOSS)
    if blocks := RUNS[run]["blocks"]:
        inner = {"target": "compresskit.distill.divergences:Divergences", "options": LOSS}
        pairs = tuple(enumerate(blocks))
        objective = WithFeatures(objective=inner, method="squarehead", pairs=pairs)
    teacher.load()
    return fit(
        model,
        Counting(),
        fields=replace(FIELDS, steps=STEPS, **changes),
        scratch=scratch,
        objective=objective,
        teacher=teacher,
        validation=Counting(),
        device="cpu",
    )


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine, changes in ENGINES.items():
        for run in RUNS:
            teacher = Divided(**options_of(place, run))
            outcome = train(place, run, place / f"{run}-{engine}-s", teacher, **changes)
            parameters: list[Any] = list(teacher.model(torch.device("cpu")).parameters())
            said = asdict(outcome) | {
                "teacher_bytes": sum(p.to_local().untyped_storage().nbytes() for p in parameters),
                "learns": any(p.requires_grad for p in parameters),
            }
            name = f"{run}-{engine}-{torch.distributed.get_rank()}.json"
            (place / name).write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
