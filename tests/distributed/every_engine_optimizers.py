"""The same training by one optimiser after another, each under the engines it is for, in one launch.

``python every_engine_optimizers.py OUT`` is one rank; it writes ``OUT/<optimizer>-<engine>.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES, FIELDS, Counting, make_model

from compresskit.training.fields import TrainingFields
from compresskit.training.optimizers import MOVED, OPTIMIZERS
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS = 8
RATES = {"adadelta": 0.5, "sgd": 0.3, "radam": 0.1}
ALIKE = ("adamw_torch_fused", "adam", "nadam", "radam", "adamax", "adadelta", "sgd", "rmsprop")
"""Each weight is stepped by itself, so that no division changes anything."""
RUNS = {
    "ddp": ("muon", "lion", "lion_8bit", "ademamix", "adamw_torch_4bit", "galore_adamw", "apollo_adamw",
            "schedule_free_adamw", "stable_adamw"),
    "fsdp": (*ALIKE, "adagrad", "muon", "adamw_torch_8bit"),
    "zero2": (*ALIKE, "adafactor"),
    "zero3": ("adam", "sgd", "rmsprop", "adafactor"),
}  # fmt: skip
HERE = {n for n, known in OPTIMIZERS.items() if not known.package or find_spec(known.package)}
CASES = [(name, engine) for engine, names in RUNS.items() for name in names if name in HERE]


def fields_of(name: str, **changes: Any) -> TrainingFields:
    known = OPTIMIZERS[name]
    fields = replace(
        FIELDS,
        steps=STEPS,
        optimizer=name,
        optimizer_options={"rank": 4} if known.low_rank else {},
        learning_rate=RATES.get(name, 5e-3),
        lr_schedule="constant" if known.constant_rate else "cosine",
        warmup_fraction=0.0,
    )
    return replace(fields, **changes)


def train(name: str, scratch: Path, **changes: Any) -> TrainOutcome:
    """By that optimiser, its zeros held where it keeps them."""
    model, held = make_model()
    rows, keeps = Counting(), OPTIMIZERS[name].zeros != MOVED
    return Run(
        model,
        rows,
        fields=fields_of(name, **changes),
        scratch=scratch,
        validation=rows,
        held=held if keeps else (),
        device="cpu",
    ).train()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.compiler.set_stance("force_eager")
    for name, engine in CASES:
        outcome = train(name, out / f"{name}-{engine}-s", **ENGINES[engine])
        if torch.distributed.get_rank() == 0:
            (out / f"{name}-{engine}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
