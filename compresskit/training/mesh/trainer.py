"""Transformers' Trainer for a model that lies in a mesh; for any other it changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer

from compresskit.training.mesh.norm import by_mesh, clip
from compresskit.training.mesh.parts import load_part, save_part
from compresskit.training.mesh.ranks import mesh_of, place
from compresskit.training.optimizing import bare
from compresskit.training.setting import Setting

SCHEDULER = "scheduler.pt"


class MeshTrainer(Trainer):
    """Divides its model itself, where the setting says how, and leaves Accelerate nothing to wrap.

    A subclass sets ``_setting`` before anything else.
    """

    _setting: Setting
    _mesh: DeviceMesh | None = None

    if TYPE_CHECKING:
        lr_scheduler: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Of the parts that this rank keeps: the model is divided here, once."""
        if not self._setting.on_mesh:
            return super().create_optimizer(model)
        whole = cast(nn.Module, self.model)
        self._mesh = mesh_of(self._setting)
        place(whole, self._mesh)
        whole._is_accelerate_prepared = True  # type: ignore[assignment]
        made = super().create_optimizer(model)
        by_mesh(made)
        return made

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._mesh is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return clip(cast(nn.Module, self.model).parameters(), float(self.args.max_grad_norm or math.inf))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Of a model in a mesh later: it is not divided yet."""
        if not self._setting.on_mesh:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._mesh is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_part(folder, cast(nn.Module, self.model), bare(self.optimizer), self._mesh)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._mesh is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        load_part(folder, cast(nn.Module, self.model), bare(self.optimizer), self._mesh)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
