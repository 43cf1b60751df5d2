"""Training that one engine begins and another goes on with, in the ranks of one launch.

``python every_engine_portable.py OUT`` is one rank. For each engine it leaves ``OUT/<engine>``, broken off
after a checkpoint, and for each move ``OUT/<from>-<to>``; and beside them the weights that were kept, and
those that the other engine began with. Imported, it gives what one process needs to do the same.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES as EVERY
from every_engine import FIELDS, Counting, make_model
from safetensors.torch import save_file

from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.trainer import StageTrainer

STEPS, KEPT, BREAK = 8, 3, 5
TP: dict[str, Any] = {"strategy": "tp", "tensor_parallel": 2}
ENGINES: Mapping[str, dict[str, Any]] = {**EVERY, "tp": TP, "one": {"micro_batch_size": 8}}
BEGUN = ("ddp", "fsdp", "zero2", "zero3", "tp")
MOVES = (
    ("fsdp", "zero3"),
    ("fsdp", "ddp"),
    ("zero3", "fsdp"),
    ("zero2", "tp"),
    ("ddp", "fsdp"),
    ("tp", "zero1"),
    ("one", "fsdp"),
    ("one", "zero3"),
)
"""From, to: both on two ranks, or begun by one process."""


def train(place: Path, name: str, engine: str, **changes: Any) -> TrainOutcome:
    """By ``engine`` in ``place/name``; what it begins with from a checkpoint is written beside it."""
    model, held = make_model()
    fields = replace(FIELDS, steps=STEPS, checkpoint_every=KEPT, **{**ENGINES[engine], **changes})
    run = Run(model, Counting(), fields=fields, scratch=place / name, held=held, device="cpu")
    with looked_at("when_prepared", 1, place / f"{name}-began.safetensors"):
        return run.train()


def begin(place: Path, engine: str, **changes: Any) -> None:
    """Train until it is broken off; what is in the one checkpoint is written beside it, too."""
    log = StageTrainer.log

    def stop(self: Any, logs: Any, *rest: Any) -> None:
        log(self, logs, *rest)
        if self.state.global_step == BREAK:
            raise InterruptedError

    StageTrainer.log = stop  # type: ignore[method-assign]
    try:
        with (
            looked_at("_save_checkpoint", 0, place / f"{engine}-kept.safetensors"),
            suppress(InterruptedError),
        ):
            train(place, engine, engine, **changes)
    finally:
        StageTrainer.log = log  # type: ignore[method-assign]


@contextmanager
def looked_at(method: str, least: int, path: Path) -> Iterator[None]:
    """While it lasts that method of the trainer is followed by writing the weights, from step ``least``."""
    real = getattr(StageTrainer, method)

    def look(self: Any, *args: Any) -> Any:
        result = real(self, *args)
        if self.state.global_step >= least:
            keep = self.is_world_process_zero()
            tensors = self.access.gather(self.model, keep=keep)
            if keep:
                save_file({k: t.clone() for k, t in tensors.items()}, path)
        return result

    setattr(StageTrainer, method, look)
    try:
        yield
    finally:
        setattr(StageTrainer, method, real)


def move(place: Path, begun: str, engine: str) -> TrainOutcome:
    """Go on by ``engine`` with a copy of what ``begun`` left."""
    name = f"{begun}-{engine}"
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        shutil.copytree(place / begun, place / name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return train(place, name, engine)


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine in BEGUN:
        begin(place, engine)
    for begun, engine in MOVES:
        outcome = move(place, begun, engine)
        if torch.distributed.get_rank() == 0:
            (place / f"{begun}-{engine}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
