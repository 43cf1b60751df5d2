"""Transformers' Trainer whose checkpoints are whole or none: what writes and reads them."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import set_seed

from compresskit.errors import EngineError, Fault
from compresskit.modeling.checkpoint import is_stored_otherwise
from compresskit.training import checkpoint
from compresskit.training.access import ParamAccess
from compresskit.training.carried import Carried, reads
from compresskit.training.mesh.trainer import SCHEDULER, MeshTrainer
from compresskit.training.optimizing import bare
from compresskit.training.portable.sources import open_source
from compresskit.training.portable.take import go_on, names_in, take_over


class KeptTrainer(MeshTrainer):
    """Each checkpoint is sealed once all ranks have written theirs; the one before it stays.

    A subclass sets ``_identity``, which run a checkpoint belongs to, and ``access``.

    Attributes:
        carried: how the run is carried out.
        before: how it was until the checkpoint that it continues from, where other processes held it.
    """

    _identity: str
    access: ParamAccess
    carried: Carried = MappingProxyType({})
    before: Carried | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights in a checkpoint only where the engine does not write its own shards.

        Of a model that is frozen in part, what training may change: the rest is loaded anew at every start.
        That, and all of a model whose files have other names than it has, is written as it runs.
        """
        place = Path(output_dir or str(self.args.output_dir))
        place.mkdir(parents=True, exist_ok=True)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self._setting.on_mesh:
            return
        model = cast(nn.Module, self.model)
        if all(p.requires_grad for p in model.parameters()) and not is_stored_otherwise(cast(Any, model)):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            save_file(self.access.gather(model, keep=True, frozen=False), place / checkpoint.TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Also what :meth:`save_model` wrote of a model that is frozen in part."""
        if self._takes_over:
            return  # when the engine has prepared the model
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

    @property
    def _takes_over(self) -> bool:
        """Whether it continues from what another engine wrote."""
        return self.before is not None and not reads(self.before, self.carried)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """What another engine wrote is put into what this one has prepared."""
        if resume_from_checkpoint is None or self.before is None or not self._takes_over:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        folder, optimizer = Path(resume_from_checkpoint), bare(self.optimizer)
        source = open_source(folder, self.before, checkpoint.mark_of(folder)["names"])
        take_over(source, cast(nn.Module, self.model), optimizer, self.access)
        go_on(self.lr_scheduler, torch.load(folder / SCHEDULER, weights_only=True), optimizer)
        self._load_scaler(resume_from_checkpoint)  # type: ignore[no-untyped-call]
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Other ranks drew other numbers: they go on from the seed and the step, alike on all."""
        if self.before is None:
            super()._load_rng_state(checkpoint)  # type: ignore[no-untyped-call]
        else:
            set_seed(int(self.args.seed) + self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write, wait for all ranks, then declare it complete; of others the one before stays."""
        folder = Path(str(self.args.output_dir))
        made = folder / f"{checkpoint.PREFIX}{self.state.global_step}"
        if self.is_world_process_zero():  # what a kill left there is no part of it
            checkpoint.discard(made)
            checkpoint.sweep(folder, self._identity, keep=1)
        _barrier()
        with checkpoint.written(made):
            super()._save_checkpoint(model, trial)
        _barrier()
        if self.is_world_process_zero():
            with checkpoint.written(made):
                names = names_in(bare(self.optimizer), cast(nn.Module, self.model))
                checkpoint.seal(made, self._identity, self.carried, names)
            checkpoint.sweep(folder, self._identity, keep=2)
        _barrier()


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
