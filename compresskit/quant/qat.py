"""What a recipe says about quantisation-aware training. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.calibration.oneshot import as_names
from compresskit.errors import Fault, InputError
from compresskit.quant.assignment import AUTO, NONE, Overrides, freeze_overrides
from compresskit.quant.scheme import parse
from compresskit.quant.stage import Quantize
from compresskit.registry import nearest
from compresskit.training.lesson import TaughtFields, lesson_faults

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

SCALES = ("dynamic", "fixed", "learned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qat(TaughtFields):
    """Train the model while it computes as its quantised form will; its weights end on the grid.

    Attributes:
        scheme: an integer one that ``quantize`` knows: ``w8a8``, ``w8a16``, ``w4a8-g32``, ``w4a16-g32`` ...
        targets: which layers: module names, fnmatch patterns, ``re:`` patterns or ``Linear``.
        ignore: which of those to leave alone.
        overrides: pattern -> another scheme, or none; of those that match a layer the first counts.
        scales: of weights: ``dynamic`` covers the weights as they are at each step; ``fixed`` takes the range
            of least squared error once, at the start; ``learned`` starts there and trains it.
        observer_steps: steps whose largest input sets the activation scale of ``w8a8-static``.
    """

    kind: ClassVar[str] = "qat"
    trains: ClassVar[bool] = True

    scheme: str = "w8a8"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: Mapping[str, Any] | tuple[str, ...] = ()
    scales: str = "dynamic"
    observer_steps: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_names(self.targets))
        object.__setattr__(self, "ignore", as_names(self.ignore))
        object.__setattr__(self, "overrides", freeze_overrides(self.overrides))
        TaughtFields.__post_init__(self)

    @property
    def form(self) -> Quantize:
        """The stage that would put a model onto such grids: it knows which layers, and what fits."""
        return Quantize(
            scheme=self.scheme, targets=self.targets, ignore=self.ignore, overrides=self.overrides
        )

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[1]``.

        Returns:
            All faults together: of the training fields, the scheme, the scales, the teacher.
        """
        from compresskit.training.outlook import student_faults

        faults = student_faults(self, model, where)
        if self.scales not in SCALES:
            cure = f"Did you mean: {nearest(self.scales, SCALES)}?"
            faults.append(Fault(f"{where}.scales", " or ".join(SCALES), repr(self.scales), cure))
        if self.observer_steps < 1:
            got = str(self.observer_steps)
            faults.append(Fault(f"{where}.observer_steps", "at least 1", got, "Raise observer_steps."))
        return faults + self.scheme_faults(model, where) + lesson_faults(self, model, where)

    def scheme_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the scheme and the targets alone."""
        overrides = cast(Overrides, self.overrides)
        named = [("scheme", self.scheme), *((f"overrides.{pattern}", text) for pattern, text in overrides)]
        cure = "Train with an integer scheme, such as w8a8 or w4a16-g32."
        faults = [
            Fault(f"{where}.{field}", "integers", text, cure)
            for field, text in named
            if not _may_be_integers(text)
        ]
        faults = faults or self.form.scheme_faults(model, where)
        if faults:
            return faults
        linears = model.anatomy.linears
        odd = [layer for layer in self.form.schemes(model.anatomy) if not linears[layer].is_plain]
        expected = "layers that compute as torch.nn.Linear does, which is what can be rounded in training"
        cure = "Add these layers to ignore, or quantise without training."
        return [Fault(f"{where}.targets", expected, ", ".join(odd), cure)] if odd else []

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.quant.qat_run import forecast_qat

        return forecast_qat(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Train ``model`` into ``context.out``, its weights on their grids.

        Raises:
            SchemeError: the scheme does not fit a layer, or ``model`` is quantised already.
            EngineError: the engine asked for is not to be had here.
            NumericError: a loss or weight is no longer finite; names the step and the layer.
            WorkerError: a training process died.
        """
        from compresskit.quant.qat_run import run_qat

        return run_qat(self, model, context)


def _may_be_integers(text: str) -> bool:
    """False for a scheme of another number; what is no scheme at all is told elsewhere."""
    if text.strip().lower() in (AUTO, NONE):
        return text.strip().lower() == NONE
    try:
        return parse(text).number == "int"
    except InputError:
        return True
