"""Adapters on a model that is frozen as it is stored, as a stage's choice of what is trainable.

Paper: Hu et al., "LoRA", 2021, https://arxiv.org/abs/2106.09685; Zimmer et al., "PERP: Rethinking the
Prune-Retrain Paradigm in the Era of LLMs", 2023, https://arxiv.org/abs/2312.15230, for updates that merge
into a pruned weight; Houlsby et al., 2019, https://arxiv.org/abs/1902.00751; Li and Liang, 2021,
https://arxiv.org/abs/2101.00190.
Shapes: as in the modules that compute with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.calibration.oneshot import largest_layer
from compresskit.errors import Fault, InputError
from compresskit.modeling import ModelSource
from compresskit.modeling.anatomy import Anatomy
from compresskit.registry import nearest
from compresskit.targets import select
from compresskit.training.adapters.adaptation import Adapted
from compresskit.training.adapters.outlook import (
    as_stored_layers,
    frozen_bytes,
    layer_faults,
    package_faults,
    prefix_faults,
    rank_faults,
    require_live_rows,
    size_faults,
    trained_parameters,
    unmergeable_faults,
)
from compresskit.training.trainable import BESIDE, FINISHES, LOW_RANK, Share, TrainableFields

if TYPE_CHECKING:
    from compresskit.stage import Json, Outlook, StageContext

READS = {
    "lora": ("rank", "alpha", "dropout", "finish", "targets", "ignore"),
    "dora": ("rank", "alpha", "dropout", "finish", "targets", "ignore"),
    "prefix": ("rank", "finish"),
    "bottleneck": ("rank", "dropout", "finish"),
}
PASSING = 3
"""Copies in float32 of the largest layer that are alive in a pass: the update, masked, and its gradient."""


class Adapter(Adapted):
    """See :class:`compresskit.training.trainable.Trainable`."""

    @staticmethod
    def reads(trainable: str) -> tuple[str, ...]:
        """Fields of the stage that it looks at under this name of the table."""
        return READS[trainable]

    @staticmethod
    def faults(stage: TrainableFields, model: Outlook, where: str) -> list[Fault]:
        """What keeps such a ``model`` from being trained so."""
        adapter = stage.trainable
        faults = size_faults(stage.rank, stage.alpha, stage.dropout, where)
        faults += package_faults("peft", f"{where}.trainable")
        if stage.finish not in FINISHES:
            cure = f"Did you mean: {nearest(stage.finish, FINISHES)}?"
            faults.append(Fault(f"{where}.finish", f"one of {', '.join(FINISHES)}", repr(stage.finish), cure))
        else:
            faults += unmergeable_faults(adapter, stage.finish, where)
        if adapter == "prefix":
            faults += prefix_faults(stage.rank, stage.context_length, model, where)
        if adapter not in LOW_RANK:
            return faults
        try:
            layers = select(model.anatomy, stage.targets, stage.ignore, where=where)
        except InputError as error:
            return faults + [fault for fault in error.faults if isinstance(fault, Fault)]
        faults += layer_faults(model.anatomy, layers, where)
        return faults + rank_faults(stage.rank, model.anatomy, layers, where)

    @staticmethod
    def share(stage: TrainableFields, anatomy: Anatomy, config: Any, weight_bytes: float) -> Share:
        """What of such a model is trained: parameters that are added to it."""
        layers = _updated(stage, anatomy)
        linears = anatomy.linears
        mask_bytes = sum(-(-linears[n].out_features * linears[n].in_features // 8) for n in layers)
        copies = PASSING if layers else int(weight_bytes < 4)
        return Share(
            trained=trained_parameters(stage.trainable, stage.rank, anatomy, config, layers),
            layers=len(layers),
            frozen_bytes=frozen_bytes(anatomy, weight_bytes),
            other_bytes=mask_bytes + 4 * copies * largest_layer(anatomy, as_stored_layers(anatomy)),
        )

    @staticmethod
    def options(stage: TrainableFields, model: ModelSource, context: StageContext) -> dict[str, Json]:
        """See :meth:`compresskit.training.trainable.Trainable.options`."""
        layers = _updated(stage, model.anatomy)
        if stage.trainable == "dora" and stage.finish == BESIDE:
            require_live_rows(model, layers)
        held = dict.fromkeys(p.layer for p in context.promises if p.kind == "zeros" and p.layer in layers)
        read = {name: getattr(stage, name) for name in ("rank", "alpha", "dropout", "finish")}
        made = {"adapter": stage.trainable, "targets": layers, "held": tuple(held), "seed": context.seed}
        return read | made


def _updated(stage: TrainableFields, anatomy: Anatomy) -> tuple[str, ...]:
    """The layers that LoRA or DoRA updates; others update none."""
    return select(anatomy, stage.targets, stage.ignore) if stage.trainable in LOW_RANK else ()
