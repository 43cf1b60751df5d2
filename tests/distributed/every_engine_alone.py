"""Steps that ranks take alone, each way, one after another, in the ranks of one launch.

``python every_engine_alone.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment. It
writes ``OUT/<run>.json``, ``OUT/<run>.safetensors`` and ``OUT/<run>-<rank>.json``: how many collectives had
begun after each step. Imported, it gives the runs and a slow and obvious way to do the same in one process.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from every_engine import FIELDS, Counting, make_model
from safetensors.torch import save_file
from torch import Tensor, nn

from compresskit.training.driver.local import LocalTrainer
from compresskit.training.order import Ordered
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS, EVERY, BREAK = 10, 4, 7
ALONE = replace(
    FIELDS,
    steps=STEPS,
    strategy="ddp",
    lr_schedule="constant",
    warmup_fraction=0.0,
    weight_decay=0.0,
    synchronise_every=EVERY,
)
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9}
OUTER: dict[str, Any] = {"synchronise": "diloco", "outer_learning_rate": 0.6, "outer_momentum": 0.8}
LOCAL: dict[str, Any] = {"synchronise": "local_sgd"}
RUNS: Mapping[str, dict[str, Any]] = {
    "sgd-ddp": SGD,
    "sgd-alone": {**SGD, **LOCAL, "synchronise_every": 1},
    "local": {**LOCAL, "eval_every": 4},
    "post": {**LOCAL, "synchronise_from": 3},
    "diloco": OUTER,
    "late": {**OUTER, "synchronise_delay": 2, "eval_every": 5},
}
AGAIN: Mapping[str, dict[str, Any]] = {
    "local-again": {**RUNS["local"], "checkpoint_every": 3},
    "late-again": {**RUNS["late"], "checkpoint_every": 5},
}
"""Broken off after step BREAK: between exchanges, and while one is under way."""
NAMES = {
    "sgd-ddp": "ddp",
    "sgd-alone": "ddp, local_sgd every 1",
    "local": "ddp, local_sgd every 4",
    "post": "ddp, local_sgd every 4",
    "diloco": "ddp, diloco every 4",
    "late": "ddp, diloco every 4, 2 late",
}


class Even(Counting):
    """Rows all of whose tokens are supervised, so that means over ranks are means over tokens."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(12)}


def train(run: str, scratch: Path, saved: dict[str, Tensor]) -> TrainOutcome:
    model, held = make_model()
    return Run(
        model,
        Even() if run.startswith("sgd") else Counting(),
        fields=replace(ALONE, **{**RUNS, **AGAIN}[run]),
        scratch=scratch,
        validation=Counting(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()


@contextmanager
def stepped(look: Any) -> Iterator[None]:
    """While it lasts ``look`` is called after each step of a rank."""
    before = LocalTrainer.when_stepped

    def when_stepped(self: LocalTrainer) -> None:
        look(self, self.state.global_step)
        before(self)

    LocalTrainer.when_stepped = when_stepped  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalTrainer.when_stepped = before  # type: ignore[method-assign]


class Slow:
    """Ranks in one process, one after another, written as the papers have it."""

    def __init__(self, run: str, ranks: int = 2) -> None:
        self.fields, self.ranks = replace(ALONE, **RUNS[run]), ranks
        self.models = [make_model()[0] for _ in range(ranks)]
        self.outer = self.now()[0]
        self.speed = {name: torch.zeros_like(p) for name, p in self.outer.items()}
        self.losses: list[float] = []

    def now(self) -> list[dict[str, Tensor]]:
        return [{name: p.detach().clone() for name, p in m.named_parameters()} for m in self.models]

    def train(self) -> None:
        fields, flight = self.fields, None
        inner = [torch.optim.AdamW(m.parameters(), fields.learning_rate, weight_decay=0) for m in self.models]
        rows = Ordered(Counting(), steps=STEPS, batch_size=8, seed=0, micro_batch_size=2, ranks=self.ranks)
        for step in range(1, STEPS + 1):
            total, count = 0.0, 0
            for rank, model in enumerate(self.models):
                places = [i for i in range(8) if i // 2 % self.ranks == rank]
                own, tokens = summed_loss(model, [rows[(step - 1) * 8 + i] for i in places])
                (own / tokens).backward()
                for name, p in model.named_parameters():
                    if "proj" in name:
                        p.grad[p == 0] = 0
                total, count = total + own.item(), count + tokens
            if step <= fields.synchronise_from:
                for alike in zip(*(m.parameters() for m in self.models), strict=True):
                    mean = sum(p.grad for p in alike) / self.ranks
                    for p in alike:
                        p.grad = mean.clone()
            for model, optimizer in zip(self.models, inner, strict=True):
                nn.utils.clip_grad_norm_(model.parameters(), fields.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            self.losses.append(total / count)
            if flight is not None and step in (STEPS, flight[0] + fields.synchronise_delay):
                self.land(flight[1])
                flight = None
            if step % EVERY == 0 or step == STEPS:
                flight = (step, self.now())
                if step == STEPS or not fields.synchronise_delay:
                    self.land(flight[1])
                    flight = None

    def land(self, then: list[dict[str, Tensor]]) -> None:
        """What ranks had when they sent it becomes new weights of all; what they did since stays."""
        fields = self.fields
        for name, start in self.outer.items():
            if fields.synchronise == "local_sgd":
                new = sum(w[name] for w in then) / self.ranks
            else:
                gap = sum(start - w[name] for w in then) / self.ranks
                self.speed[name] = fields.outer_momentum * self.speed[name] + gap
                new = start - fields.outer_learning_rate * (gap + fields.outer_momentum * self.speed[name])
            self.outer[name] = new
            for model, was in zip(self.models, then, strict=True):
                p = model.get_parameter(name)
                p.data = new + p.data - was[name]


def summed_loss(model: nn.Module, rows: list[Mapping[str, Tensor]]) -> tuple[Tensor, int]:
    ids, labels = (torch.stack([r[name] for r in rows]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss, int((labels[:, 1:] != -100).sum())


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for run in {**RUNS, **AGAIN}:
        saved, begun = dict[str, Tensor](), list[int]()

        def count(trainer: LocalTrainer, step: int, begun: list[int] = begun) -> None:
            begun.append(dist.group.WORLD._get_sequence_number_for_group())

        def stop(trainer: LocalTrainer, step: int) -> None:
            if step == BREAK:
                raise InterruptedError

        if run in AGAIN:
            with stepped(stop), suppress(InterruptedError):
                train(run, out / run, {})
        with stepped(count):
            outcome = train(run, out / run, saved)
        rank = dist.get_rank()
        (out / f"{run}-{rank}.json").write_text(json.dumps(begun))
        if rank == 0:
            save_file({k: t.clone() for k, t in saved.items()}, out / f"{run}.safetensors")
            (out / f"{run}.json").write_text(json.dumps(asdict(outcome)))
        if run in AGAIN:
            ended = train(run, out / run, {})
            (out / f"{run}-ended-{rank}.json").write_text(json.dumps(asdict(ended)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
