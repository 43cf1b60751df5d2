"""Retraining by low-rank updates that merge into a pruned weight: W + mask * (B A) alpha / R.

A layer computes in training with the very update that is merged at the end, so the merge changes nothing
but rounding, and every zero that is held is exactly zero all along.

Paper: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023,
https://arxiv.org/abs/2312.15230; Hu et al., "LoRA", 2021, https://arxiv.org/abs/2106.09685.
Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compresskit.calibration.oneshot import largest_layer
from compresskit.errors import Fault, InputError
from compresskit.modeling import ModelSource
from compresskit.modeling.anatomy import Anatomy
from compresskit.targets import select
from compresskit.training.lowrank.attach import ADAPTER, attach_lora
from compresskit.training.lowrank.frozen import frozen_linear, frozen_model
from compresskit.training.lowrank.masked import mask_update
from compresskit.training.lowrank.merge import merged
from compresskit.training.lowrank.outlook import (
    INSTALL,
    factor_parameters,
    layer_faults,
    rank_faults,
    size_faults,
)
from compresskit.training.trainable import Share, TrainableFields
from compresskit.training.write import Changed, as_stored, write_checkpoint

if TYPE_CHECKING:
    from compresskit.stage import Json, Outlook, StageContext

PASSING = 3
"""Copies in float32 of the largest layer that are alive in a pass: the update, masked, and its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A frozen model with low-rank updates; see :class:`compresskit.training.trainable.Trainable`.

    Attributes:
        rank: R.
        alpha: the update is multiplied by alpha / R.
        targets: names of linear layers.
        held: those of them whose zeros stay.
        seed: of the factors' first values.
    """

    masks_gradients: ClassVar[bool] = False
    saves_frozen: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("rank", "alpha", "targets", "ignore")

    rank: int
    alpha: float
    targets: tuple[str, ...]
    held: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        for name in ("targets", "held"):  # a job's options have been through JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @staticmethod
    def faults(stage: TrainableFields, model: Outlook, where: str) -> list[Fault]:
        """What keeps such a ``model`` from being trained so."""
        faults = size_faults(stage.rank, stage.alpha, where)
        if find_spec("peft") is None:
            got = "an environment without it"
            faults.append(Fault(f"{where}.trainable", "the package peft", got, INSTALL))
        try:
            layers = select(model.anatomy, stage.targets, stage.ignore, where=where)
        except InputError as error:
            return faults + [fault for fault in error.faults if isinstance(fault, Fault)]
        faults += layer_faults(model.anatomy, layers, where)
        return faults + rank_faults(stage.rank, model.anatomy, layers, where)

    @staticmethod
    def share(stage: TrainableFields, anatomy: Anatomy) -> Share:
        """What of such a model is trained: factors that are added to it."""
        layers = select(anatomy, stage.targets, stage.ignore)
        linears = anatomy.linears
        mask_bytes = sum(-(-linears[n].out_features * linears[n].in_features // 8) for n in layers)
        return Share(
            trained=factor_parameters(stage.rank, anatomy, layers),
            frozen=anatomy.num_parameters,
            layers=len(layers),
            other_bytes=mask_bytes + 4 * PASSING * largest_layer(anatomy, layers),
        )

    @staticmethod
    def options(stage: TrainableFields, model: ModelSource, context: StageContext) -> dict[str, Json]:
        """See :meth:`compresskit.training.trainable.Trainable.options`."""
        layers = select(model.anatomy, stage.targets, stage.ignore)
        held = dict.fromkeys(p.layer for p in context.promises if p.kind == "zeros" and p.layer in layers)
        return {
            "rank": stage.rank,
            "alpha": stage.alpha,
            "targets": layers,
            "held": tuple(held),
            "seed": context.seed,
        }

    def load(self, source: ModelSource) -> nn.Module:
        """The frozen model with its updates, which begin at zero.

        Args:
            source: a dense checkpoint.

        Returns:
            A causal language model of transformers, on the CPU.
        """
        model = frozen_model(
            source, frozenset(self.targets), lambda _, weight, bias: frozen_linear(weight, bias)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            attach_lora(model, targets=self.targets, rank=self.rank, alpha=self.alpha)
        for layer in self.held:
            mask_update(model.get_submodule(layer), source.weight_OI(layer) != 0)
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a complete dense checkpoint, the trained factors ``tensors`` merged into it."""
        make = {f"{layer}.weight": partial(self._merged, source, layer, tensors) for layer in self.targets}
        write_checkpoint(source, out, Changed(source, make))

    def _merged(self, source: ModelSource, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        weight_OI = source.weight_OI(layer)
        a_RI, b_OR = (tensors[f"{layer}.lora_{factor}.{ADAPTER}.weight"].float() for factor in "AB")
        keep_OI = weight_OI != 0 if layer in self.held else None
        new_OI = merged(weight_OI.float(), a_RI, b_OR, self.alpha / self.rank, keep_OI=keep_OI)
        return as_stored(source, layer, new_OI)
