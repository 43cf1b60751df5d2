"""Training by pipelines, each schedule, one after another, in the two or four ranks of one launch.

``python every_engine_pipeline.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment.
It writes ``OUT/<run>.json``, ``OUT/<run>.safetensors`` and ``OUT/<run>-<rank>.json``, the bytes of parameters
each rank kept. Imported, it gives the training to compare with.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import every_engine
import torch
import torch.distributed as dist
from every_engine import FIELDS, Counting, broken_off
from safetensors.torch import save_file
from torch import Tensor

from compresskit.distill.divergences import Divergences
from compresskit.training.objective import Hidden, Signal, head_of
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS = 8
WHOLE = replace(FIELDS, steps=STEPS, micro_batch_size=8, eval_every=4)
TWO: dict[str, Any] = {"pipeline_stages": 2, "micro_batch_size": 2, "eval_every": 4}
RUNS: Mapping[str, dict[str, Any]] = {
    "gpipe": {**TWO, "pipeline_schedule": "gpipe"},
    "1f1b": {**TWO, "pipeline_schedule": "1f1b", "activation_checkpointing": True},
    "interleaved": {**TWO, "pipeline_schedule": "interleaved"},
    "tied": {**TWO, "micro_batch_size": 1},
    "again": {**TWO, "checkpoint_every": 3, "keep_best": True},
    "taught": TWO,
    "bf16": {**TWO, "precision": "bf16"},
}
FOUR: Mapping[str, dict[str, Any]] = {
    "side": {**TWO, "checkpoint_every": 3},
    "side-interleaved": {**TWO, "pipeline_schedule": "interleaved"},
    "tied-four": {**TWO, "pipeline_stages": 4},
}
NAMES = {run: "pipeline 2 x 1f1b" for run in RUNS} | {
    "gpipe": "pipeline 2 x gpipe",
    "interleaved": "pipeline 2 x interleaved",
    "side": "pipeline 2 x 1f1b, 2 side by side",
    "side-interleaved": "pipeline 2 x interleaved, 2 side by side",
    "tied-four": "pipeline 4 x 1f1b",
}
TRUE = {"tied": "tied", "tied-four": "tied", "taught": "taught", "bf16": "bf16"}
"""Which training in one process a run has to agree with; the others with ``untied``."""
BREAK, BROKEN = 5, ("again", "side")
make_model = partial(every_engine.make_model, layers=4)


class Packed(Counting):
    """Rows of two documents each, told apart by their positions."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return row | {"position_ids": torch.cat((torch.arange(5), torch.arange(7)))}


class Teacher:
    """Another model of the kind, whole in the process that asks it, which begins to count its asks."""

    hidden = None

    def __init__(self) -> None:
        self.model, _ = make_model(tied=True)
        self.asked = 0

    def load(self) -> None:
        """It is there."""

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        self.asked += 1
        states = self.model.base_model(inputs["input_ids"], position_ids=inputs["position_ids"])[0]
        return Signal(Hidden(states, head_of(self.model)))


def train(run: str, scratch: Path, saved: dict[str, Tensor], **changes: Any) -> TrainOutcome:
    model, held = make_model(tied=TRUE.get(run) == "tied")
    taught = {"objective": Divergences(), "teacher": Teacher()} if run == "taught" else {}
    return Run(
        model,
        Packed(),
        **taught,
        fields=replace(WHOLE, **changes),
        scratch=scratch,
        validation=Packed(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for run, changes in (RUNS if int(os.environ["WORLD_SIZE"]) == 2 else FOUR).items():
        saved: dict[str, Tensor] = {}
        start = partial(train, run, out / run, saved, **changes)
        outcome = broken_off(start, BREAK) if run in BROKEN else start()
        rank = dist.get_rank()
        (out / f"{run}-{rank}.json").write_text(json.dumps(outcome.parameter_bytes))
        if rank == 0:
            save_file({k: t.clone() for k, t in saved.items()}, out / f"{run}.safetensors")
            (out / f"{run}.json").write_text(json.dumps(asdict(outcome)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
