"""Checkpoints of ranks that differ: each writes what it holds, and reads it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from compresskit.training.trainer import StageTrainer


class OwnState(StageTrainer):
    """A trainer whose ranks hold other weights than each other, or other states of the optimiser."""

    def more_state(self) -> dict[str, Any]:
        """What else a checkpoint of this rank has: tensors, numbers and containers of them."""
        return {}

    def load_more(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`more_state`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the directory; weights are written beside the optimiser's states, by each rank."""
        Path(output_dir or str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, schedule = self._steppers
        state = {
            "weights": {name: p.detach() for name, p in self._trained().items()},
            "buffers": dict(cast(nn.Module, self.model).named_buffers()),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "more": self.more_state(),
        }
        torch.save(state, self._own_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: the engine has to prepare the model first, which may overwrite weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(self._own_file(checkpoint), map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state["weights"][name])
            for name, buffer in cast(nn.Module, self.model).named_buffers():
                buffer.copy_(state["buffers"][name])
        for stepper, kept in zip(self._steppers, (state["optimizer"], state["schedule"]), strict=True):
            stepper.load_state_dict(kept)
        self.load_more(state["more"])

    @property
    def _steppers(self) -> tuple[Any, Any]:
        return self.optimizer, self.lr_scheduler

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in cast(nn.Module, self.model).named_parameters() if p.requires_grad}

    def _own_file(self, folder: str) -> Path:
        return Path(folder) / f"rank-{self.args.process_index}.pt"
