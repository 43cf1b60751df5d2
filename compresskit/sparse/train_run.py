"""Training that makes zeros, at work: what it takes, and what changes the zeros in every training process.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from compresskit.calibration.oneshot import largest_layer
from compresskit.errors import Fault, PatternError
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.sparse.base import MaskLearner, Moment, TrainedPruner, moment_seed
from compresskit.sparse.pattern import parse_pattern
from compresskit.sparse.promise import Zeros
from compresskit.training.job import Part
from compresskit.training.lesson import forecast_taught, lesson_bytes, lesson_parts
from compresskit.training.outlook import STATE_BYTES, forecast_training, live_copy_bytes
from compresskit.training.setting import Setting, launched_processes, passes_per_step
from compresskit.training.stage import run_training

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.train import SparseTrain
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

SCHEDULED = "compresskit.sparse.train_run:Scheduled"
MASKED = "compresskit.sparse.masked:Masked"
CHOSEN = "compresskit.sparse.chosen:Chosen"


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A trained pruner at work on the layers of one model; see ``compresskit.training.zeroing``.

    Attributes:
        method: a name of ``compresskit.sparse.TRAINED_PRUNERS``.
        options: its own fields.
        ends: layer -> the pattern it ends with, as :func:`compresskit.sparse.pattern.parse_pattern` reads it.
        transposed: of those layers, the ones whose parameter is stored (I, O).
        seed: of the run.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ends: Mapping[str, str]
    transposed: tuple[str, ...] = ()
    seed: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """See ``Zeroing.layers``."""
        return tuple(self.ends)

    def due(self, step: int, steps: int) -> bool:
        """See ``Zeroing.due``."""
        return any(pruner.due(step, steps) for pruner in self._pruners.values())

    def needs_gradient(self, step: int, steps: int) -> bool:
        """See ``Zeroing.needs_gradient``."""
        return any(p.needs_gradient and p.due(step, steps) for p in self._pruners.values())

    def change(
        self, layer: str, weight_OI: Tensor, gradient_OI: Tensor | None, *, step: int, steps: int
    ) -> Tensor:
        """See ``Zeroing.change``."""
        turned = layer in self.transposed
        if turned:
            weight_OI, gradient_OI = weight_OI.T, None if gradient_OI is None else gradient_OI.T
        moment = Moment(step, steps, moment_seed(self.seed, step, layer), gradient_OI)
        made_OI = self._pruners[layer].update(weight_OI, moment)
        return made_OI.T.contiguous() if turned else made_OI

    @cached_property
    def _pruners(self) -> dict[str, TrainedPruner]:
        method: Any = TRAINED_PRUNERS[self.method]
        return {n: method(pattern=parse_pattern(end), **self.options) for n, end in self.ends.items()}


def forecast_sparse(stage: SparseTrain, model: Outlook) -> Forecast:
    """What training takes, and changing the zeros of the largest layer besides."""
    layers, linears = tuple(stage.patterns(model)), model.anatomy.linears
    method, taught = TRAINED_PRUNERS[stage.method], lesson_bytes(stage, model)
    weights = sum(linears[name].out_features * linears[name].in_features for name in layers)
    largest = largest_layer(model.anatomy, layers)
    other = live_copy_bytes(stage, model.anatomy, layers) if stage.swaps_layers else 0
    logits: int | None = None
    if method.learns_masks:
        each = cast(MaskLearner, stage.pruner(str(stage.pattern))).logits_per_weight
        logits = round(each * weights)
        # Each process loads the frozen model whole. Of the largest layer: its mask, the weight times that,
        # noise, a blend, what they are made of, and their gradients, all in float32.
        other += 4 * model.anatomy.num_parameters + round(4 * (2 + 6 * each) * largest)
    else:
        # The weight before and after in float32, a score, what selecting among all of it needs, and masks.
        other += largest * (4 + 4 + 4 + 12 + 4)
        # A gradient collected for a step, and scores that are trained, are kept as the parameters are.
        held = (4 * method.needs_gradient + STATE_BYTES * method.learns_scores) * weights
        setting = Setting(stage, launched_processes() or stage.processes, "cpu")
        other += held // setting.parameter_parts
    found = forecast_training(stage, model, teacher_bytes=taught, trained=logits, other_bytes=other)
    found = replace(found, layers=len(layers), notes=(*found.notes, *stage.form.uneven(model)))
    return forecast_taught(found, stage, model)


def run_sparse(stage: SparseTrain, model: ModelSource, context: StageContext) -> StageResult:
    """Train ``model`` as ``stage`` says into ``context.out``, and promise its zeros.

    Raises:
        PatternError: the pattern does not fit a layer, or promised zeros would grow again.
        RunError: training had to stop.
    """
    if faults := stage.zero_faults(model, stage.kind):
        raise PatternError(*faults)
    patterns = stage.patterns(model)
    promised = [p.layer for p in context.promises if p.kind == "zeros" and p.layer in patterns]
    if promised and stage.regrows:
        got = f"zeros promised in {len(promised)} layers, such as {promised[0]}"
        cure = "Use method gradual, which keeps them, or put these layers into ignore."
        raise PatternError(Fault(f"{stage.kind}.method", "layers whose zeros may move", got, cure))
    ends = {layer: str(pattern) for layer, pattern in patterns.items()}
    options: dict[str, Any] = {"method": stage.method, "options": dict(stage.options), "ends": ends}
    adaptation: Part | None = None
    zeroing: Part | None = None
    if stage.swaps_layers:
        method = TRAINED_PRUNERS[stage.method]
        twice: tuple[str, ...] = ()
        if stage.activation_checkpointing and (method.learns_scores or method.learns_masks):
            # The backward pass computes some blocks once more, and nothing else.
            numbers = {name: index for index, name in enumerate(model.anatomy.blocks)}
            places = {layer: numbers.get(model.anatomy.linears[layer].block or "") for layer in ends}
            twice = tuple(n for n, place in places.items() if place is not None and stage.recomputes(place))
        options |= {"passes_per_step": passes_per_step(stage), "twice": twice, "steps": stage.steps or 1}
        seeded = {"seed": context.seed}
        adaptation = Part(CHOSEN, options | seeded) if method.learns_masks else Part(MASKED, options)
    else:
        turned = tuple(layer for layer in ends if model.anatomy.linears[layer].transposed)
        zeroing = Part(SCHEDULED, options | {"transposed": turned, "seed": context.seed})
    loss, teacher = lesson_parts(stage, model, context)
    result = run_training(
        stage,
        model,
        context,
        title="Training towards zeros",
        objective=loss,
        teacher=teacher,
        adaptation=adaptation,
        zeroing=zeroing,
        promises=tuple(Zeros(layer=layer, pattern=end) for layer, end in ends.items()),
    )
    said = stage.form.uneven(model) if result.layers else []
    return replace(result, warnings=(*result.warnings, *said))
