"""Ranks of unlike speed get unlike shares of a step's rows, so that none waits long for another.

What a rank does alone, its forward passes, is timed in some of the first steps. Then the rows of each step
are divided in proportion to the tokens a second, once for the rest of the run; all ranks take equally many
passes, none of more rows than ``micro_batch_size``. Losses are weighted by supervised tokens, so a step stays
what it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from compresskit.training.trainer import StageTrainer, summed

STATE = "shares.json"
UNMEASURED, MEASURED = 2, 6
"""Steps after a start that warm up, and steps after those whose forward passes are timed."""
LEAST_GAIN = 0.05
"""Of the longest rank's time; for less the shares stay equal."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How the rows of a step are divided.

    Attributes:
        rows: of each rank.
        passes: of every rank.
        first: step, from 0, that is divided so.
    """

    rows: tuple[int, ...]
    passes: int
    first: int = 0

    def fit(self, *, ranks: int, micro_batch_size: int) -> bool:
        """Whether they are for so many ranks, and passes of no more rows."""
        return len(self.rows) == ranks and max(self.rows) <= self.passes * micro_batch_size

    def parts(self, rank: int) -> list[range]:
        """Of the rows of a step, those of each pass of ``rank``."""
        begin, own = sum(self.rows[:rank]), self.rows[rank]
        cuts = [begin + own * i // self.passes for i in range(self.passes + 1)]
        return [range(*cuts[i : i + 2]) for i in range(self.passes)]


def shares_of(speeds: Sequence[float], *, rows: int, micro_batch_size: int) -> Shares:
    """The division of ``rows`` whose slowest rank is done first.

    Args:
        speeds: of each rank, in any unit.
        rows: of a step, a multiple of micro_batch_size times ranks.
        micro_batch_size: rows of a pass, at most.

    Returns:
        Shares of at least a row for each pass, in as few passes as they allow; equal ones where others would
        save less than ``LEAST_GAIN`` of the time.
    """
    ranks = len(speeds)
    equal = Shares((rows // ranks,) * ranks, rows // (ranks * micro_batch_size))
    made = equal
    for passes in range(equal.passes, rows // ranks + 1):
        share = _fastest(speeds, rows, least=passes)
        if max(share) <= passes * micro_batch_size:
            made = Shares(share, passes)
            break
    before, after = (_longest(shares.rows, speeds) for shares in (equal, made))
    return made if after < (1 - LEAST_GAIN) * before else equal


def _fastest(speeds: Sequence[float], rows: int, least: int) -> tuple[int, ...]:
    """Row after row to the rank that would be done with it first."""
    share = [least] * len(speeds)
    for _ in range(rows - sum(share)):
        rank = min(range(len(speeds)), key=lambda r: ((share[r] + 1) / speeds[r], r))
        share[rank] += 1
    return tuple(share)


def _longest(share: Sequence[int], speeds: Sequence[float]) -> float:
    return max(rows / speed for rows, speed in zip(share, speeds, strict=True))


class Divided(Sampler[list[int]]):
    """Which items one rank reads in each pass, from the first step that ``shares`` divide.

    Args:
        shares: of all ranks.
        rank: whose items.
        steps: of the whole run.
        batch_size: items of a step.
        begin: the step, from 0, to begin with.
    """

    def __init__(self, shares: Shares, *, rank: int, steps: int, batch_size: int, begin: int) -> None:
        self._parts, self._batch_size = shares.parts(rank), batch_size
        self._steps = range(begin, steps)

    def __len__(self) -> int:
        return len(self._steps) * len(self._parts)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for part in self._parts:
                yield [step * self._batch_size + place for place in part]


class SharingTrainer(StageTrainer):
    """The trainer of ``shares: measured``; takes what StageTrainer takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shares: Shares | None = None
        self.divided: tuple[int, ...] = ()
        self._batches: Iterator[Mapping[str, Tensor]] | None = None
        self._seconds, self._timed_rows, self._steps_here = 0.0, 0, 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """See :meth:`StageTrainer.get_batch_samples`; of this rank's own share, once there is one."""
        passes = int(self.args.gradient_accumulation_steps)
        return super().get_batch_samples(self._batches or epoch_iterator, passes, device)

    def _sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.shares is not None or not model.training or self._steps_here < UNMEASURED:
            return super()._sums(model, inputs)
        before = self._now()
        sums = super()._sums(model, inputs)
        self._seconds += self._now() - before
        self._timed_rows += len(inputs["input_ids"])
        return sums

    def _now(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        return time.perf_counter()

    def when_stepped(self) -> None:
        """Also decide, after some steps, and divide the following ones so."""
        super().when_stepped()
        if not self.state.global_step:
            return
        self._steps_here += 1
        if self.shares is None and self._steps_here == UNMEASURED + MEASURED:
            self._decide()
        if self.shares is not None and self._batches is None and self.shares.first == self.state.global_step:
            self._divide()

    def _decide(self) -> None:
        """Every rank decides the same, by what all have told."""
        told = torch.zeros(self.args.world_size, dtype=torch.float64, device=self.args.device)
        # Rows are of one length, so rows a second are tokens a second.
        told[self.args.process_index] = self._timed_rows / max(self._seconds, 1e-9)
        size, before = self._setting.fields.batch_size, int(self.args.gradient_accumulation_steps)
        micro = self._setting.micro_batch_size
        made = shares_of(summed(told).tolist(), rows=size, micro_batch_size=micro)
        # The Trainer counts passes from the first of all, and a step ends at a multiple of its own.
        first = self.state.global_step
        while first * before % made.passes:
            first += 1
        self.shares = Shares(made.rows, made.passes, first)

    def _divide(self) -> None:
        """Read this rank's share from the next step on."""
        assert self.shares is not None
        fields, args = self._setting.fields, self.args
        self.divided = self.shares.rows
        args.gradient_accumulation_steps = self.shares.passes
        items = Divided(
            self.shares,
            rank=args.process_index,
            steps=args.max_steps,
            batch_size=fields.batch_size,
            begin=self.state.global_step,
        )
        loader = DataLoader(
            cast(Dataset[Any], self.train_dataset),
            batch_sampler=items,
            collate_fn=self._collate,
            num_workers=fields.workers,
            prefetch_factor=fields.prefetch if fields.workers else None,
            pin_memory=args.device.type == "cuda",
            generator=torch.Generator(),  # of its own: dropout draws from the other one
        )
        self._batches = iter(loader)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.shares is not None and self.is_world_process_zero():
            (Path(output_dir) / STATE).write_text(json.dumps(asdict(self.shares)), encoding="utf-8")

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Which epoch of the loader to begin in, and how many batches to leave out: it has only one epoch."""
        super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        step = self.state.global_step
        kept = Path(resume_from_checkpoint or "") / STATE
        if resume_from_checkpoint and kept.is_file():
            data = json.loads(kept.read_text(encoding="utf-8"))
            found, micro = Shares(**data | {"rows": tuple(data["rows"])}), self._setting.micro_batch_size
            # Else nothing is divided yet, or for other ranks and passes than these: it measures anew.
            if step >= found.first and found.fit(ranks=self.args.world_size, micro_batch_size=micro):
                self.shares = found
                if step < max_steps:
                    self._divide()
                elif step > found.first:
                    self.divided = found.rows
        if step >= max_steps:
            return epochs, 0
        return 0, step * int(self.args.gradient_accumulation_steps)
