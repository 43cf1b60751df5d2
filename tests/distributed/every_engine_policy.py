"""On-policy distillation under every engine, one after another, in the ranks of one launch.

``python every_engine_policy.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment. It
writes ``OUT/<engine>.json``, ``OUT/<engine>-<rank>.pt``, all batches that a rank learnt from, and
``OUT/<engine>.safetensors``. Imported, it gives the training.
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
from every_engine import FIELDS, Counting, broken_off, make_model
from safetensors.torch import save_file
from torch import Tensor

from compresskit.distill.divergences import Divergences
from compresskit.training.objective import Head, Hidden, Signal, head_of
from compresskit.training.outcome import TrainOutcome
from compresskit.training.rollout import OnPolicy
from compresskit.training.run import Run

STEPS, TOKEN = 4, 33
POLICY = OnPolicy(fraction=0.5, max_new_tokens=4)
ENGINES: Mapping[str, dict[str, Any]] = {name: PLAIN[name] for name in ("ddp", "fsdp", "zero3")}


class Keeping:
    """A teacher like the student at the start, which keeps what it is asked."""

    hidden = None

    def __init__(self) -> None:
        self.model, _ = make_model()
        self.asked: list[dict[str, Tensor]] = []

    def load(self) -> None:
        self.weight_VD = head_of(self.model).weight_VD.detach().clone()

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        self.asked.append({name: t.clone() for name, t in inputs.items()})
        with torch.no_grad():
            states = self.model.base_model(inputs["input_ids"], position_ids=inputs["position_ids"])[0]
        return Signal(Hidden(states, Head(self.weight_VD)))


def train(
    scratch: Path, saved: dict[str, Tensor], *, stubborn: bool = False, **changes: Any
) -> tuple[TrainOutcome, Keeping]:
    """Train a student; a ``stubborn`` one can say nothing but TOKEN, and does not learn."""
    torch.manual_seed(1)
    model, held = make_model(tied=False)
    if stubborn:
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(48))
            model.lm_head.bias[TOKEN] = 50
    teacher = Keeping()
    teacher.load()
    rate = 1e-9 if stubborn else FIELDS.learning_rate
    fields = replace(FIELDS, steps=STEPS, checkpoint_every=1, **{"learning_rate": rate} | changes)
    outcome = Run(
        model,
        Counting(),
        fields=fields,
        scratch=scratch,
        objective=Divergences(),
        teacher=teacher,
        held=held,
        device="cpu",
        save=saved.update,
        on_policy=POLICY,
    ).train()
    return outcome, teacher


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine, changes in ENGINES.items():
        saved: dict[str, Tensor] = {}
        outcome, teacher = train(out / f"{engine}-s", saved, **changes)
        rank = torch.distributed.get_rank()
        torch.save(teacher.asked, out / f"{engine}-{rank}.pt")
        again: dict[str, Tensor] = {}
        resumed = broken_off(
            lambda changes=changes, again=again, engine=engine: train(  # type: ignore[misc]
                out / f"{engine}-again-s", again, **changes
            )[0],
            3,
        )
        _, stubborn = train(out / f"{engine}-one-s", {}, stubborn=True, **changes)
        torch.save(stubborn.asked, out / f"{engine}-{rank}-one.pt")
        if rank == 0:
            save_file({k: t.clone() for k, t in saved.items()}, out / f"{engine}.safetensors")
            save_file({k: t.clone() for k, t in again.items()}, out / f"{engine}-again.safetensors")
            told = {"outcome": asdict(outcome), "resumed": asdict(resumed)}
            (out / f"{engine}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
