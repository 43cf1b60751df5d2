"""Quantisation-aware training at work: layers swapped in place, trained, and saved on their grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from compresskit.calibration.oneshot import largest_layer
from compresskit.errors import SchemeError
from compresskit.formats.grid import Grid, write_grids
from compresskit.quant.affine import activation_scale, grid_for
from compresskit.quant.fake import DYNAMIC, LEARNED, learned_scale, round_in_place
from compresskit.quant.outlook import forecast_rounding
from compresskit.quant.promise import OnGrid
from compresskit.quant.scheme import parse
from compresskit.training.adaptation import Plain
from compresskit.training.job import Part
from compresskit.training.lesson import forecast_taught, lesson_bytes, lesson_parts
from compresskit.training.outlook import forecast_training, live_copy_bytes
from compresskit.training.setting import passes_per_step
from compresskit.training.stage import run_training

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.quant.qat import Qat
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

ROUNDED = "compresskit.quant.qat_run:Rounded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """The model whose layers compute with rounded weights and inputs; saved on the grids they used last.

    Attributes:
        schemes: layer -> scheme, as :func:`compresskit.quant.scheme.parse` reads it.
        scales: see :func:`compresskit.quant.fake.round_in_place`.
        observed_passes: see there.
    """

    masks_gradients: ClassVar[bool] = True
    saves_frozen: ClassVar[bool] = True

    schemes: Mapping[str, str]
    scales: str = DYNAMIC
    observed_passes: int = 0

    def load(self, source: ModelSource) -> nn.Module:
        """See ``Adaptation.load``."""
        model = Plain().load(source)
        for layer, scheme in self.schemes.items():
            module: Any = model.get_submodule(layer)
            round_in_place(
                module,
                parse(scheme),
                scales=self.scales,
                dtype=source.dtype(f"{layer}.weight"),
                observed_passes=self.observed_passes,
            )
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """See ``Adaptation.save``."""
        grids = {layer: self._grid(layer, tensors) for layer in self.schemes}
        names = {layer: f"{layer}.weight" for layer in self.schemes}
        snapped = {name: grids[layer].snap(tensors[name]) for layer, name in names.items()}
        write_grids(out, grids)
        Plain().save(source, out, {**tensors, **snapped})

    def _grid(self, layer: str, tensors: Mapping[str, Tensor]) -> Grid:
        """The grid that the last forward pass would have used for the weight as it is now."""
        scheme, weight_OI = parse(self.schemes[layer]), tensors[f"{layer}.weight"]
        fixed: Tensor | None = None
        if scheme.static:
            fixed = activation_scale(tensors[f"{layer}.input_max"], weight_OI.dtype)
        if self.scales == DYNAMIC:
            return replace(grid_for(weight_OI, scheme), activation_scale=fixed)
        scale_OG = tensors[f"{layer}.start_scale_OG"]
        if self.scales == LEARNED:
            scale_OG = learned_scale(scale_OG, tensors[f"{layer}.log_scale_OG"])
        return Grid(
            bits=scheme.weight_bits,
            scale_OG=scale_OG.to(weight_OI.dtype),
            group_size=scheme.group_size,
            activation_bits=scheme.activation_bits,
            zero_point_OG=tensors.get(f"{layer}.zero_point_OG"),
            activation_scale=fixed,
        )


def forecast_qat(stage: Qat, model: Outlook) -> Forecast:
    """What training takes, and the rounded weights besides; the layers' bits go down."""
    after = forecast_rounding(stage.form, model)
    schemes = stage.form.schemes(model.anatomy)
    # Beside the rounded weights of a pass, what rounds the largest.
    other = live_copy_bytes(stage, model.anatomy, schemes) + 13 * largest_layer(model.anatomy, list(schemes))
    trained = forecast_training(stage, model, teacher_bytes=lesson_bytes(stage, model), other_bytes=other)
    notes = trained.notes + after.notes
    found = replace(trained, after=after.after, layers=len(schemes), notes=notes)
    return forecast_taught(found, stage, model)


def run_qat(stage: Qat, model: ModelSource, context: StageContext) -> StageResult:
    """Train ``model`` as ``stage`` says into ``context.out``, and promise its grids.

    Raises:
        SchemeError: the scheme does not fit a layer, or a layer is quantised already.
        RunError: training had to stop.
    """
    if faults := stage.scheme_faults(model, stage.kind):
        raise SchemeError(*faults)
    schemes = {layer: str(scheme) for layer, scheme in stage.form.schemes(model.anatomy).items()}
    passes = passes_per_step(stage)
    if stage.activation_checkpointing:
        passes *= 2  # the backward pass computes each block once more
    options = {
        "schemes": schemes,
        "scales": stage.scales,
        "observed_passes": passes * stage.observer_steps,
    }
    loss, teacher = lesson_parts(stage, model, context)
    return run_training(
        stage,
        model,
        context,
        title="Training on the grid",
        objective=loss,
        teacher=teacher,
        adaptation=Part(ROUNDED, options),
        promises=tuple(OnGrid(layer=layer, scheme=scheme) for layer, scheme in schemes.items()),
    )
