"""Fewer rows a pass where memory runs out, and more passes: the batch of a step stays what it was.

All ranks do the same: after each pass forward, and each backward, they agree whether any of them was short of
memory. Then all of them forget what the step has summed up, halve the rows of a pass and begin the step
again. So that no rank waits in a collective that another will never reach, gradients are exchanged after the
passes of a step, not beside them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from compresskit.errors import Fault, RunError
from compresskit.training.finite import on_every_rank

Batch = dict[str, Any]
CURE = "Shorten context_length, set activation_checkpointing or offload_activations, or shard the model."


class ShortOfMemory(Exception):
    """Some rank was; all ranks raise it together."""


class Backoff:
    """Takes the passes of one step after another, with as many rows each as have fitted so far.

    Args:
        rows: of a pass, to begin with.
        device: that computes.

    Attributes:
        rows: of a pass now.
        told: what was done about it, in full sentences.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device, self.told = rows, device, tuple[str, ...]()
        self._of_step: list[Batch] = []

    def agreed(self, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What ``compute`` returns; ShortOfMemory on every rank if it was short of memory on any."""
        made: Mapping[str, Tensor] = {}
        short = False
        try:
            made = compute()
        except RuntimeError as error:
            if not is_short(error):
                raise
            short = True
        if on_every_rank(short, self.device):
            raise ShortOfMemory
        return made

    def take(self, batch: Batch, run: Callable[[Batch], Tensor], trainer: Any) -> Tensor:
        """Forward and backward of one batch, in passes that fit.

        Args:
            batch: tensors of the same number of rows.
            run: forward and backward of some rows; returns their part of the loss.
            trainer: that takes the step.

        Returns:
            The part of the loss of ``batch``.

        Raises:
            RunError: not even one row fits; on all ranks.
        """
        self._of_step.append(batch)
        waiting = [batch]
        total = torch.zeros((), device=self.device)
        while waiting:
            current, *waiting = waiting
            with trainer.accelerator.no_sync(model=trainer.model_wrapped):
                found = self._fits(current, run)
            if found is None:
                self._halve(trainer.state.global_step + 1)
                trainer.begin_step_again()
                waiting = list(self._of_step)
            else:
                total = found
        if trainer.accelerator.sync_gradients:
            self._of_step.clear()
            exchange(trainer.model)
        return total

    def _fits(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor | None:
        """The loss of a batch, pass by pass; None as soon as some rank is short of memory."""
        total = torch.zeros((), device=self.device)
        for piece in pieces(batch, self.rows):
            short = False
            try:
                total = total + run(piece)
            except ShortOfMemory:
                return None
            except RuntimeError as error:
                if not is_short(error):
                    raise
                short = True
            if on_every_rank(short, self.device):
                return None
        return total

    def _halve(self, step: int) -> None:
        """Half as many rows a pass from now on."""
        gc.collect()
        clear_device_cache()
        if self.rows == 1:
            got = f"too little memory in step {step}"
            raise RunError(Fault("adapt_batch", "memory for a pass of one row", got, CURE))
        before, self.rows = self.rows, self.rows // 2
        self.told += (
            f"Memory ran out in step {step} with {before} rows a pass: from there on each pass has "
            f"{self.rows}, and steps have more of them. The batch of a step is the same.",
        )


def is_short(error: RuntimeError) -> bool:
    """Whether ``error`` says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def pieces(batch: Batch, rows: int) -> list[Batch]:
    """``batch`` in parts of at most so many rows, in their order."""
    count = len(batch["input_ids"])
    if count <= rows:
        return [batch]
    # What a teacher elsewhere said of the whole is left out: it is asked about the parts.
    tensors = {name: tensor for name, tensor in batch.items() if isinstance(tensor, Tensor)}
    return [
        {name: tensor[first : first + rows] for name, tensor in tensors.items()}
        for first in range(0, count, rows)
    ]


def exchange(model: nn.Module) -> None:
    """The mean over ranks of each gradient of ``model``, in place."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    waiting = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= dist.get_world_size()
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in waiting:
        work.wait()
