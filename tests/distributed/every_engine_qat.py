"""The same training on the grid under every engine, one after another, in the ranks of one launch.

``python every_engine_qat.py OUT`` is one rank; it trains the model in ``OUT/model`` and leaves
``OUT/<run>-<engine>`` and ``.json``. Imported, it gives what one process needs to do the same.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from every_engine import ENGINES as EVERY
from every_engine import FIELDS, Counting
from torch import Tensor

from compresskit.modeling import ModelSource
from compresskit.quant.qat_run import Rounded
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS = 10
ENGINES = {name: changes for name, changes in EVERY.items() if name != "zero1"}
RUNS: Mapping[str, tuple[str, str]] = {
    "dynamic": ("w4a8-channel", "w8a8"),
    "learned": ("w4a16-g8", "w4a8-channel"),
    "fixed": ("w8a8-static", "w4a16-g8-asym"),
}
"""Scales -> the schemes of attention and of the rest."""
ALL_FIELDS = replace(FIELDS, steps=STEPS)


def adaptation(source: ModelSource, run: str, observed_passes: int) -> Rounded:
    """Attention in one scheme, the rest in the other."""
    attention, rest = RUNS[run]
    layers = [name for name in source.anatomy.linears if name != "lm_head"]
    schemes = {name: attention if "attn" in name else rest for name in layers}
    return Rounded(schemes=schemes, scales=run, observed_passes=observed_passes)


def train(run: str, source: ModelSource, out: Path, scratch: Path, fields: TrainingFields) -> TrainOutcome:
    """Train into ``out``; pruned weights, half of all, are held."""
    adapted, rows = (
        adaptation(source, run, 2 if fields.micro_batch_size == fields.batch_size else 4),
        Counting(),
    )

    def save(tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            out.mkdir()
            adapted.save(source, out, tensors)

    model = adapted.load(source)
    held = tuple(adapted.schemes)
    return Run(
        model, rows, fields=fields, scratch=scratch, validation=rows, held=held, device="cpu", save=save
    ).train()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    source = ModelSource(out / "model")
    for engine, changes in ENGINES.items():
        for run in RUNS:
            name = f"{run}-{engine}"
            outcome = train(run, source, out / name, out / f"{name}-s", replace(ALL_FIELDS, **changes))
            if torch.distributed.get_rank() == 0:
                (out / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
