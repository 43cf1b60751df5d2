"""Feature losses under every engine, one after another, in the ranks of one launch.

``python every_engine_features.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment.
The models are in ``OUT``; it writes ``OUT/<run>-<engine>.json`` and ``.safetensors`` there. Imported, it
gives the training to compare with.
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
from every_engine import ENGINES as PLAIN
from every_engine import FIELDS, Counting
from safetensors.torch import save_file
from torch import Tensor

from compresskit.distill.features import WithFeatures
from compresskit.distill.teacher import Replica
from compresskit.modeling import load_model
from compresskit.training.fit import fit
from compresskit.training.outcome import TrainOutcome

VOCABULARY, STEPS = 48, 10
FORWARD_KL = {"target": "compresskit.distill.divergences:Divergences", "options": {}}
RUNS: Mapping[str, dict[str, Any]] = {
    "wide": {"method": "squarehead", "pairs": ((0, 1), (1, 3)), "widths": None},
    "narrow": {"method": "hidden_mse", "pairs": ((1, 3),), "widths": (16, 32)},
}
"""A student as wide as its teacher, and one half as wide, whose projection trains along."""
ENGINES: Mapping[str, dict[str, Any]] = PLAIN | {
    f"{engine}-again": {**PLAIN[engine], "activation_checkpointing": True} for engine in ("fsdp", "zero3")
}


def train(
    place: Path, run: str, scratch: Path, saved: dict[str, Tensor], **changes: Any
) -> tuple[TrainOutcome, tuple[str, ...]]:
    """Train the student of ``run``, whose zeros are held; returns the outcome and whose they are."""
    model = load_model(place / run)
    held = tuple(name for name, _ in model.named_modules() if name.endswith("proj"))
    with torch.no_grad():
        for name in held:
            model.get_submodule(name).weight[:, ::2] = 0
    objective = WithFeatures(objective=FORWARD_KL, options={"weight": 0.5}, **RUNS[run])
    blocks = [theirs for _, theirs in objective.pairs]
    teacher = Replica(directory=str(place / "teacher"), vocabulary=VOCABULARY, blocks=blocks)
    teacher.load()
    outcome = fit(
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
    )
    return outcome, held


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine, changes in ENGINES.items():
        for run in RUNS:
            name, saved = f"{run}-{engine}", dict[str, Tensor]()
            outcome, _ = train(place, run, place / f"{name}-s", saved, **changes)
            if torch.distributed.get_rank() == 0:
                save_file({k: t.clone() for k, t in saved.items()}, place / f"{name}.safetensors")
                (place / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
