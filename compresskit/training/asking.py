"""Ask a teacher; one elsewhere before each step, so that all steps done are kept when it is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from compresskit.errors import CheckpointError, Fault, RunError
from compresskit.training.finite import on_every_rank
from compresskit.training.objective import Remote, Signal, TeacherProvider
from compresskit.training.order import FED

SIGNAL = "signal"
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Asking:
    """What a trainer asks its teacher.

    Attributes:
        teacher: who is asked.
        device: that ranks agree on.
        keep: writes down the steps that are done, and says in a sentence where the same command continues;
            every rank calls it.
    """

    teacher: TeacherProvider
    device: torch.device
    keep: Callable[[], str]

    def ahead(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """The batches of a step, with what a teacher elsewhere says of them; of another as they are.

        In the middle of a step random numbers were drawn already that a restart would draw again.

        Raises:
            RunError: the teacher is lost to some rank; all ranks raise it.
        """
        if not isinstance(self.teacher, Remote):
            return [dict(batch) for batch in batches]
        there = [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]
        return [{**batch, SIGNAL: said} for batch, said in zip(there, self._agreed(there), strict=True)]

    def about(self, batch: Batch) -> Signal:
        """What the teacher says of a batch, if that is not known yet.

        Raises:
            RunError: the teacher is lost to some rank; all ranks raise it.
        """
        if SIGNAL in batch:
            known: Signal = batch[SIGNAL]
            return known
        return self._agreed([batch])[0] if isinstance(self.teacher, Remote) else self._said(batch)

    def _said(self, batch: Batch) -> Signal:
        with torch.no_grad():
            return self.teacher.signal({name: batch[name] for name in FED if name in batch})

    def _agreed(self, batches: Sequence[Batch]) -> list[Signal]:
        """What is said of ``batches``, once all ranks have their answers."""
        signals, lost, broken = [], None, None
        try:
            signals = [self._said(batch) for batch in batches]
        except RunError as error:
            lost = error
        except Exception as error:  # other ranks must not wait for one that fails in another way
            broken, lost = error, RunError(f"{type(error).__name__}: {error}")
        if on_every_rank(lost is not None, self.device):
            faults = _first(lost)
            raise RunError(*faults, self._kept()) from (broken or lost)
        return signals

    def _kept(self) -> str:
        """What :attr:`keep` says; a disk that takes nothing must not hide why the run ends."""
        try:
            return self.keep()
        except (OSError, CheckpointError) as error:
            return f"No checkpoint of it could be written: {error}".rstrip(".") + "."


def _first(lost: RunError | None) -> tuple[Fault | str, ...]:
    """What the first rank says that lost its teacher; every rank asks."""
    faults = None if lost is None else lost.faults
    if not (dist.is_available() and dist.is_initialized()):
        return faults or ()
    told: list[tuple[Fault | str, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, faults)
    return next((found for found in told if found is not None), ())


def continuing(step: int, steps: int) -> str:
    """Where the same command continues after ``step`` of ``steps``, which is kept, in a sentence."""
    if not step:
        return "No step was finished yet: the same command begins this stage again."
    return f"The same command continues at the checkpoint of step {step} of {steps}."
