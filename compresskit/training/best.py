"""The weights of the best evaluation so far, whole on the disk, whatever engine holds them in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compresskit.errors import Fault, NumericError
from compresskit.training.arguments import CHECKPOINTS
from compresskit.training.checkpoint import disk_told

BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class Best:
    """A file that is either whole or not there.

    Attributes:
        path: of the file; a kill leaves the one before in its place.
        frozen: whether parameters that take no gradient are kept, too.
    """

    path: Path
    frozen: bool = True

    def offer(
        self, step: int, loss: float, before: float, gathered: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Keep the weights of ``step`` if its validation loss is the lowest.

        Args:
            step: optimiser steps that are done.
            loss: of this evaluation; the same on every rank.
            before: the lowest of earlier ones, also of those before a restart.
            gathered: the whole weights, on the main process; every rank calls it, or none.

        Raises:
            CheckpointError: they could not be written; the file before is as it was.
        """
        if not loss < before:
            return
        if tensors := gathered():
            part = self.path.with_suffix(".partial")
            with disk_told(self.path, "the best weights on the disk", self.path.parent / CHECKPOINTS):
                try:
                    save_file(dict(tensors), part, metadata={"step": str(step), "loss": repr(loss)})
                    os.replace(part, self.path)
                finally:
                    part.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what another run left; on the main process, before the first evaluation."""
        self.path.unlink(missing_ok=True)

    def read(self) -> tuple[int, float, dict[str, Tensor]]:
        """The step, its validation loss and the weights; on the main process, after an evaluation.

        Raises:
            NumericError: no evaluation had a finite loss.
        """
        if not self.path.is_file():
            cure = "Lower learning_rate, or mend the rows that are evaluated on."
            raise NumericError(Fault("keep_best", "a validation loss that is finite", "none", cure))
        with safe_open(self.path, framework="pt") as file:
            told = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return int(told["step"]), float(told["loss"]), tensors
