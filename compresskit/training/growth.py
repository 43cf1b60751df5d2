"""A batch that grows: where the noise scale has reached twice its rows, later steps have twice as many.

It never shrinks. The rows keep the order of the seed: a grown step has those that as many smaller ones would
have had. ``steps`` counts optimiser steps, whatever they read. With ``epochs`` the rows are the limit: grown
steps are fewer, and each moves the schedule of the learning rate on as far as the rows that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresskit.training.fields import TrainingFields
from compresskit.training.noise_scale import NoiseScale, PassNorms
from compresskit.training.optimizing import bare
from compresskit.training.order import supervised
from compresskit.training.rules.memory import NOISE
from compresskit.training.trainer import StageTrainer, summed

STATE = "growth.json"
LEAST = 20
"""Measured steps before the batch doubles, and again before it doubles once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How far a batch has grown: plain data, the same on every rank.

    Attributes:
        batch_size: rows of a step at the start.
        times: how many of those a step reads now.
        taken: how many of those all steps so far have read.
        since: steps measured since the batch grew.
        scale: of the noise.
        sizes: first step -> rows of a step from there on.
    """

    batch_size: int
    times: int = 1
    taken: int = 0
    since: int = 0
    scale: NoiseScale = field(default_factory=NoiseScale)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of a step now."""
        return self.times * self.batch_size

    def stepped(self, scale: NoiseScale, *, step: int, most: int, left: int | None) -> Growth:
        """What it is after a step.

        Args:
            scale: with this step in it, if it told anything.
            step: its number, from 1.
            most: rows of a step, at most.
            left: batches of ``batch_size`` rows after this step; None where steps are counted.
        """
        since = self.since + (scale.steps - self.scale.steps)
        stepped = replace(self, taken=self.taken + self.times, scale=scale, since=since)
        twice = 2 * self.times
        # Passes of a step are counted from the first of all, so one of twice as many begins at a multiple.
        fits = stepped.taken % twice == 0 and 2 * self.rows <= most and (left is None or left >= twice)
        if since < LEAST or not fits or not scale.reaches(2 * self.rows):
            return stepped
        sizes = {**self.sizes, str(step + 1): 2 * self.rows}
        return replace(stepped, times=twice, since=0, sizes=sizes)

    def told(self) -> dict[str, Any]:
        """What an outcome says of it."""
        return {"batch_sizes": dict(self.sizes), "noise_scale_rows": self.scale.rows}

    def to_json(self) -> str:
        """As text that :func:`growth_from_json` reads back to an equal one."""
        return json.dumps(asdict(self))


def growth_from_json(text: str) -> Growth:
    """Inverse of :meth:`Growth.to_json`."""
    data = json.loads(text)
    return Growth(**data | {"scale": NoiseScale(**data["scale"])})


def batches_at_most(fields: TrainingFields, steps: int) -> int:
    """Batches of ``batch_size`` rows that are read at most.

    Args:
        fields: how to train.
        steps: of the optimiser, or batches of the epochs where those are counted.
    """
    if fields.adapt_batch != NOISE:
        return steps
    times = (fields.largest_batch_size or fields.batch_size) // fields.batch_size
    most = 1 << (times.bit_length() - 1)
    # The last step of an epoch may want rows of the next one.
    return steps * most if fields.steps else steps + most - 1


class GrowingTrainer(StageTrainer):
    """The trainer of ``adapt_batch: noise``; takes what StageTrainer takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = self._setting.fields.batch_size
        self.growth = Growth(batch_size=size, sizes={"1": size})
        self._passes_at_first = int(self.args.gradient_accumulation_steps)
        self._batches = int(self.args.max_steps)
        self._norms: PassNorms | None = None
        self._parts_sum = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._passes, self._tokens = 0, 0
        self._before = self.growth

    @property
    def _by_rows(self) -> bool:
        """Whether epochs, and not steps, are the limit."""
        return self._setting.fields.steps is None

    def when_prepared(self) -> None:
        """Also measure gradients from now on."""
        super().when_prepared()
        self._norms = PassNorms(cast(nn.Module, self.model), self._held, self.args.device)
        self.resources.callback(self._norms.detach)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """See :meth:`StageTrainer.training_step`; the gradient of each pass is measured."""
        assert self._norms is not None
        tokens = supervised(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        squares = self._norms.take()
        if tokens:
            self._parts_sum += squares / tokens
            self._passes += 1
        self._tokens = int(num_items_in_batch or tokens)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """See :meth:`StageTrainer._clip_grad_norm`; decides what the next step reads."""
        norm = super()._clip_grad_norm(model)
        total = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._grow(self._measured(float(total)))
        return norm

    def _measured(self, norm: float) -> NoiseScale:
        """The noise scale with this step in it; every rank asks, and all get the same."""
        told = torch.stack(
            (
                self._parts_sum,
                self._parts_sum.new_tensor(self._passes),
                # Of one rank alone, so that a last bit of difference could not part them.
                self._parts_sum.new_tensor(norm**2 if self.is_world_process_zero() else 0.0),
            )
        )
        parts, passes, whole = summed(told).tolist()
        self._parts_sum.zero_()
        self._passes = 0
        scaler = self.accelerator.scaler
        # compute_loss multiplied by the ranks and divided by the step's tokens, and fp16 by its scale.
        factor = self._tokens / (self._setting.data_ranks * (scaler.get_scale() if scaler else 1.0)) ** 2
        return self.growth.scale.after(
            whole=whole, parts=parts * factor, passes=round(passes), rows=self.growth.rows
        )

    def _grow(self, scale: NoiseScale) -> None:
        step, before = self.state.global_step + 1, self.growth
        left = self._batches - before.taken - before.times if self._by_rows else None
        largest = self._setting.fields.largest_batch_size or before.batch_size
        if step < self.state.max_steps:
            self.growth = before.stepped(scale, step=step, most=largest, left=left)
        else:
            self.growth = replace(before, taken=before.taken + before.times, scale=scale)
        self._before = before
        self._apply(step)

    def _apply(self, step: int) -> None:
        """Have the Trainer read as many batches a step after ``step``, and stop in time."""
        self.args.gradient_accumulation_steps = self._passes_at_first * self.growth.times
        if self._by_rows:
            left = max(self._batches - self.growth.taken, 0)
            self.state.max_steps = step + -(-left // self.growth.times)
        if self._watch is not None:
            self._watch.progress.total = self.state.max_steps

    def when_stepped(self) -> None:
        """Also move the learning rate on with the rows that were read, and scale it where the batch grew."""
        super().when_stepped()
        if not self.state.global_step:
            return
        if self._by_rows and not self.accelerator.optimizer_step_was_skipped:
            for _ in range(self._before.times - 1):
                self.lr_scheduler.step()
        grew = self.growth.times / self._before.times
        times = self._setting.fields.rate_times(grew)
        if times != 1:
            self.lr_scheduler.base_lrs = [rate * times for rate in self.lr_scheduler.base_lrs]
            for group in bare(self.optimizer).param_groups:
                group["lr"] *= times

    @property
    def _done_fraction(self) -> float:
        """Of the rows, where they are the limit."""
        return self.growth.taken / self._batches if self._by_rows else super()._done_fraction

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also tell how many rows the step had, and the noise scale."""
        if self._watch is not None and "loss" in logs:
            if self._own_tokens is None:
                self._own_tokens = self._before.times * self._watch.tokens_per_step
            self._watch.batch(self.state.global_step, self._before.rows, self.growth.scale.rows)
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_world_process_zero():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            (Path(output_dir) / STATE).write_text(self.growth.to_json(), encoding="utf-8")

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Which epoch of the loader to begin in, and how many batches to leave out: it has only one epoch."""
        super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        if not resume_from_checkpoint:
            return 0, 0
        kept = Path(resume_from_checkpoint) / STATE
        self.growth = self._before = growth_from_json(kept.read_text(encoding="utf-8"))
        self._apply(self.state.global_step)
        if self.state.global_step >= self.state.max_steps:
            return epochs, 0
        return 0, self.growth.taken * self._passes_at_first
