"""DeepSpeed's ZenFlow, and plain offload to compare with, one after another, in the ranks of one launch.

``python every_engine_zenflow.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment. It
writes ``OUT/<run>.json``, ``OUT/<run>.safetensors`` and ``OUT/<run>-<rank>.json``: after each step a digest
of the weights, the columns that the step changed, and those that were chosen. Imported, it gives the runs
and a slow and obvious way to do the same in one process.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from every_engine import FIELDS, Counting, broken_off, make_model
from every_engine_alone import summed_loss
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import get_scheduler

from compresskit.training.driver.zenflow import ZenFlowTrainer
from compresskit.training.order import Ordered
from compresskit.training.outcome import TrainOutcome
from compresskit.training.rules.zenflow import span
from compresskit.training.run import Run

STEPS, EVERY, BREAK = 19, 4, 18
"""Columns are chosen anew after 16 steps, and after the last but one an update is owed."""
ZENFLOW = replace(
    FIELDS,
    steps=STEPS,
    micro_batch_size=4,
    weight_decay=0.0,
    strategy="deepspeed",
    zero_stage=2,
    offload="optimizer",
    overlap=False,
    synchronise="zenflow",
    synchronise_every=EVERY,
)
RUNS: Mapping[str, dict[str, Any]] = {
    "plain": {"synchronise": "every_step"},
    "zenflow": {"eval_every": 6},
    "again": {"eval_every": 6, "checkpoint_every": span(EVERY)},
    "bf16": {"precision": "bf16"},
}


def train(run: str, scratch: Path, saved: dict[str, Tensor]) -> TrainOutcome:
    model, held = make_model()
    return Run(
        model,
        Counting(),
        fields=replace(ZENFLOW, **RUNS[run]),
        scratch=scratch,
        validation=Counting(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()


def look(trainer: ZenFlowTrainer, before: dict[str, Tensor]) -> dict[str, Any]:
    """What the step just taken did to matrices, and a digest of all weights; updates ``before``."""
    told: dict[str, Any] = {"changed": {}, "chosen": {}}
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        now = parameter.detach().clone()
        digest.update(now.contiguous().numpy().tobytes())
        if now.dim() == 2:
            told["changed"][name] = (now != before[name]).any(0).nonzero().flatten().tolist()
            told["chosen"][name] = sorted(parameter.selected_indices.tolist())
        before[name] = now
    return told | {"digest": digest.hexdigest()}


class Slow:
    """ZenFlow in one process, written as its paper has it; the columns are those that were ``chosen``."""

    def __init__(self, chosen: list[dict[str, list[int]]]) -> None:
        self.chosen = chosen
        self.model, _ = make_model()
        self.weights = dict(self.model.named_parameters())
        self.losses: list[float] = []
        self.contrasts: list[float] = []

    def train(self) -> None:
        fast: dict[str, list[Any]] = {}
        slow = {name: _fresh(p) for name, p in self.weights.items()}
        sums = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        host = self.now()
        rates = self.rates()
        for step in range(1, STEPS + 1):
            gradients = self.gradients(step)
            chosen = {name: torch.tensor(columns) for name, columns in self.chosen[step - 1].items()}
            if step % span(EVERY) == 1:
                fast, host = {}, self.now()
                self.contrast(gradients, chosen)
            at_once = {}
            for name, p in self.weights.items():
                part = (slice(None), chosen[name]) if p.dim() == 2 else (slice(None),)
                own, gradient = p.detach()[part], gradients[name][part]
                state = fast.setdefault(name, _fresh(own))
                at_once[name] = part, _adam(own, gradient, state, state[2] + 1, rates[step - 1])
                sums[name] += gradients[name]
            if step % EVERY == 0 or step == STEPS:
                norm = torch.stack([s.norm() for s in sums.values()]).norm()
                factor = min(1.0, ZENFLOW.max_grad_norm / float(norm))
                for name, p in self.weights.items():
                    host[name] = _adam(host[name], sums[name] * factor, slow[name], step, rates[step - 1])
                    p.data = host[name].clone()
                    sums[name].zero_()
            for name, (part, new) in at_once.items():
                self.weights[name].data[part] = new

    def now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def rates(self) -> list[float]:
        warmup = round(ZENFLOW.warmup_fraction * STEPS)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=ZENFLOW.learning_rate)
        schedule = get_scheduler("cosine", optimizer, warmup, STEPS)
        return [ZENFLOW.learning_rate * schedule.lr_lambdas[0](step) for step in range(STEPS)]

    def gradients(self, step: int) -> dict[str, Tensor]:
        """A late update is of their mean, so each is a part of it; those of zeros are zeros."""
        rows = Ordered(Counting(), steps=STEPS, batch_size=8, seed=0, micro_batch_size=4, ranks=2)
        total, tokens = summed_loss(self.model, [rows[(step - 1) * 8 + i] for i in range(8)])
        self.losses.append(total.item() / tokens)
        self.model.zero_grad()
        (total / tokens / EVERY).backward()
        zeros = {name: (p == 0) if "proj" in name else None for name, p in self.weights.items()}
        return {
            name: p.grad if zeros[name] is None else p.grad.masked_fill(zeros[name], 0)
            for name, p in self.weights.items()
        }

    def contrast(self, gradients: dict[str, Tensor], chosen: dict[str, Tensor]) -> None:
        """How much larger gradients of chosen columns are than the mean column's, of each matrix."""
        for name, columns in chosen.items():
            sizes = gradients[name].abs().sum(0)
            self.contrasts.append(float(sizes[columns].mean() / sizes.mean()))


def _fresh(like: Tensor) -> list[Any]:
    return [torch.zeros_like(like), torch.zeros_like(like), 0]


def _adam(weight: Tensor, gradient: Tensor, state: list[Any], step: int, rate: float) -> Tensor:
    """The weight after a step of Adam that counts as the ``step``-th; of ``state`` the moments are kept."""
    state[0] = 0.9 * state[0] + 0.1 * gradient
    state[1] = 0.999 * state[1] + 0.001 * gradient**2
    state[2] = step
    mean, square = state[0] / (1 - 0.9**step), state[1] / (1 - 0.999**step)
    return weight.detach() - rate * mean / (square.sqrt() + 1e-8)


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    stepped = ZenFlowTrainer.stepped
    for run in RUNS:
        saved = dict[str, Tensor]()
        told = list[dict[str, Any]]()
        before = {name: p.detach().clone() for name, p in make_model()[0].named_parameters()}

        def noted(
            self: ZenFlowTrainer, *, late: bool, told: Any = told, before: Any = before, **_: Any
        ) -> None:
            stepped(self, late=late)
            told.append(look(self, before))

        def start(run: str = run, saved: dict[str, Tensor] = saved) -> TrainOutcome:
            return train(run, out / run, saved)

        ZenFlowTrainer.stepped = noted  # type: ignore[method-assign]
        outcome = broken_off(start, BREAK) if run == "again" else start()
        (out / f"{run}-{dist.get_rank()}.json").write_text(json.dumps(told))
        if dist.get_rank() == 0:
            save_file({k: t.clone() for k, t in saved.items()}, out / f"{run}.safetensors")
            (out / f"{run}.json").write_text(json.dumps(asdict(outcome)))
        if run == "again":
            (out / f"ended-{dist.get_rank()}.json").write_text(json.dumps(asdict(start(saved={}))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
