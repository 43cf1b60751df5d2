"""Transformers' Trainer whose checkpoints are whole or none: what writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from compresskit.errors import EngineError, Fault
from compresskit.training import checkpoint
from compresskit.training.access import ParamAccess
from compresskit.training.mesh.trainer import MeshTrainer


class KeptTrainer(MeshTrainer):
    """Each checkpoint is sealed once all ranks have written theirs; the one before it stays.

    A subclass sets ``_identity``, which run a checkpoint belongs to, and ``access``.
    """

    _identity: str
    access: ParamAccess

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights in a checkpoint only where the engine does not write its own shards.

        Of a model that is frozen in part, what training may change: the rest is loaded anew at every start.
        """
        place = Path(output_dir or str(self.args.output_dir))
        place.mkdir(parents=True, exist_ok=True)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self._setting.on_mesh:
            return
        model = cast(nn.Module, self.model)
        if all(p.requires_grad for p in model.parameters()):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            save_file(self.access.gather(model, keep=True, frozen=False), place / checkpoint.TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Also what :meth:`save_model` wrote of a model that is frozen in part."""
        trained = Path(resume_from_checkpoint) / checkpoint.TRAINED
        if not trained.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        unknown = (
            cast(nn.Module, self.model).load_state_dict(load_file(trained), strict=False).unexpected_keys
        )
        if unknown:
            cure = "Remove the directory, or train with the versions it was begun with."
            raise EngineError(Fault(str(trained), "parameters of the model", unknown[0], cure))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write, wait for all ranks, then declare it complete; of others the one before stays."""
        folder = Path(str(self.args.output_dir))
        made = folder / f"{checkpoint.PREFIX}{self.state.global_step}"
        if self.is_world_process_zero():
            checkpoint.sweep(folder, self._identity, keep=1, spare=made)
        with checkpoint.written(made):
            super()._save_checkpoint(model, trial)
        _barrier()
        if self.is_world_process_zero():
            with checkpoint.written(made):
                checkpoint.seal(made, self._identity)
            checkpoint.sweep(folder, self._identity, keep=2)
        _barrier()


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
