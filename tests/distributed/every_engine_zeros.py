"""The same making and moving of zeros under every engine, one after another, in the ranks of one launch.

``python every_engine_zeros.py OUT`` is one rank; it leaves ``OUT/<run>-<engine>.json`` and ``.safetensors``.
Imported, it gives what one process needs to do the same.
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
from every_engine import ENGINES, FIELDS, Counting, make_model
from safetensors.torch import save_file
from torch import Tensor

from compresskit.sparse.train_run import Scheduled
from compresskit.training.fields import TrainingFields
from compresskit.training.fit import TrainOutcome, fit

STEPS = 12
RUNS: Mapping[str, dict[str, Any]] = {
    "gradual": {"method": "gradual", "options": {"update_every": 3}, "end": "70%:layer"},
    "gradual-groups": {"method": "gradual", "options": {"update_every": 2, "end": 0.5}, "end": "2:4"},
    "set": {"method": "set", "options": {"update_every": 3}, "end": "70%:layer"},
    "rigl": {"method": "rigl", "options": {"update_every": 3}, "end": "70%:layer"},
}
ALL_FIELDS = replace(FIELDS, steps=STEPS)


def zeroing(run: str, layers: tuple[str, ...]) -> Scheduled:
    """What changes zeros in ``run``."""
    asked = RUNS[run]
    return Scheduled(
        method=asked["method"], options=asked["options"], ends=dict.fromkeys(layers, asked["end"])
    )


def train(run: str, scratch: Path, fields: TrainingFields, saved: dict[str, Tensor]) -> TrainOutcome:
    """Train a tiny Llama, dense at first, and put what is saved into ``saved``."""
    model, layers = make_model(zeros=False)
    rows = Counting()
    return fit(
        model,
        rows,
        fields=fields,
        scratch=scratch,
        validation=rows,
        zeroing=zeroing(run, layers),
        device="cpu",
        save=saved.update,
    )


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine, changes in ENGINES.items():
        for run in RUNS:
            saved: dict[str, Tensor] = {}
            outcome = train(run, out / f"{run}-{engine}", replace(ALL_FIELDS, **changes), saved)
            if torch.distributed.get_rank() == 0:
                save_file({k: t.clone() for k, t in saved.items()}, out / f"{run}-{engine}.safetensors")
                (out / f"{run}-{engine}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
