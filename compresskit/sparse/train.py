"""What a recipe says about training that makes zeros. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.calibration.oneshot import as_names
from compresskit.errors import Fault, PatternError
from compresskit.options import Options, freeze_options, option_faults
from compresskit.registry import nearest
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.sparse.stage import Prune
from compresskit.training.lesson import TaughtFields, lesson_faults

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.base import TrainedPruner
    from compresskit.sparse.pattern import Pattern
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTrain(TaughtFields):
    """Train the model while its weights become zero, or while its zeros move to where they cost least.

    Attributes:
        method: a name of ``compresskit.sparse.TRAINED_PRUNERS``.
        pattern: of the zeros at the end: ``80%`` or ``0.8`` (of each row), ``80%:layer`` (of the whole
            layer), ``2:4`` (keep 2 of every 4 inputs), ``80%:16x16`` (of the layer's blocks of 16 outputs by
            16 inputs).
        targets: which layers: module names, fnmatch patterns, ``re:`` patterns or ``Linear``.
        ignore: which of those to leave alone.
        on_indivisible: what to do about layers the pattern does not fit: ``error``, ``skip`` them, or ``pad``
            them, as if they had more inputs (and outputs, for blocks), all zero.
        options: the method's own fields, e.g. ``{"end": 0.5}`` for ``gradual``.
    """

    kind: ClassVar[str] = "sparse_train"
    trains: ClassVar[bool] = True
    zeroes: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False  # of a dense model at first, of a sparse one at last

    method: str = "gradual"
    pattern: str | float = "80%:layer"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    on_indivisible: str = "error"
    options: Mapping[str, Any] | Options = ()

    def __post_init__(self) -> None:
        TaughtFields.__post_init__(self)
        # YAML reads 0.8 as a number; a stage has one spelling of it, so that equal recipes are equal.
        object.__setattr__(self, "pattern", str(self.pattern))
        object.__setattr__(self, "targets", as_names(self.targets))
        object.__setattr__(self, "ignore", as_names(self.ignore))
        object.__setattr__(self, "options", freeze_options(self.options))

    @property
    def form(self) -> Prune:
        """The stage that would make such zeros at once: it knows which layers, and what fits."""
        return Prune(
            "magnitude",
            pattern=self.pattern,
            targets=self.targets,
            ignore=self.ignore,
            on_indivisible=self.on_indivisible,
        )

    @property
    def regrows(self) -> bool:
        """Whether the method lets a weight grow again that an earlier stage promised to be zero."""
        return self.method in TRAINED_PRUNERS and TRAINED_PRUNERS[self.method].regrows

    @property
    def swaps_layers(self) -> bool:
        """Whether the method makes layers compute with something else than their weight."""
        return self.method in TRAINED_PRUNERS and TRAINED_PRUNERS[self.method].masks_forward

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[1]``.

        Returns:
            All faults together: of the training fields, the method, its options, the pattern, the teacher.
        """
        from compresskit.training.outlook import student_faults

        faults = student_faults(self, model, where) + lesson_faults(self, model, where)
        return faults + self.form.skip_faults(where) + self.zero_faults(model, where)

    def zero_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the method, its options, the pattern and the targets alone."""
        from compresskit.sparse.pattern import parse_pattern

        if self.method not in TRAINED_PRUNERS:
            cure = f"Did you mean: {nearest(self.method, TRAINED_PRUNERS)}?"
            return [Fault(f"{where}.method", "the name of a trained pruner", repr(self.method), cure)]
        method: Any = TRAINED_PRUNERS[self.method]
        faults = option_faults(method, self._options, where=where, stage=SparseTrain, reserved=("pattern",))
        misplaced = self.form.pattern_faults(model, where)
        expected: str | None = None
        with suppress(PatternError):  # what is no pattern is among the faults already
            expected = method.unfit(parse_pattern(str(self.pattern)))
        if not misplaced and expected:
            cure = f"Choose such a pattern, or another method than {self.method}."
            misplaced.append(Fault(f"{where}.pattern", expected, repr(self.pattern), cure))
        if not faults and expected == "":
            told = getattr(self.pruner(str(self.pattern)), "faults", None)
            faults += told(where) if told else []
        if not misplaced and self.swaps_layers:
            misplaced += self._swap_faults(model, where)
        return faults + misplaced

    def _swap_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        linears, faults = model.anatomy.linears, []
        if odd := [name for name in self.form.layers(model) if not linears[name].is_plain]:
            expected = "layers that compute as torch.nn.Linear does, which is what can be masked in a pass"
            cure = "Add these layers to ignore, or use method gradual."
            faults.append(Fault(f"{where}.targets", expected, ", ".join(odd), cure))
        method = TRAINED_PRUNERS[self.method]
        if (method.learns_scores or method.learns_masks) and self.steps is None:
            cure = "Set steps: layers have to know how many there are."
            faults.append(Fault(f"{where}.steps", f"a number, with method {self.method}", "none", cure))
        if self.precision == "fp16" and not method.learns_scores:
            cure = "Use precision bf16, or method gradual."
            what = "reward" if method.learns_masks else "pull"
            expected = f"bf16 or fp32 with method {self.method}, whose {what} knows no loss scale"
            faults.append(Fault(f"{where}.precision", expected, self.precision, cure))
        return faults

    def layers(self, model: Outlook | ModelSource) -> tuple[str, ...]:
        """The layers that end with zeros; the stage has no faults for ``model``."""
        return tuple(self.patterns(model))

    def patterns(self, model: Outlook | ModelSource) -> dict[str, Pattern]:
        """Layer -> the pattern it ends with; the stage has no faults for ``model``."""
        linears = model.anatomy.linears
        shapes = {n: (linears[n].out_features, linears[n].in_features) for n in self.form.layers(model)}
        found = self.pruner(str(self.pattern)).patterns(shapes)
        return {name: self.form.fitted(pattern, linears[name]) for name, pattern in found.items()}

    def pruner(self, pattern: str) -> TrainedPruner:
        """The method for a layer that ends with ``pattern``."""
        from compresskit.sparse.pattern import parse_pattern

        method: Any = TRAINED_PRUNERS[self.method]
        made: TrainedPruner = method(pattern=parse_pattern(pattern), **dict(self._options))
        return made

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.sparse.train_run import forecast_sparse

        return forecast_sparse(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Train ``model`` into ``context.out``, with the zeros of the pattern.

        Raises:
            PatternError: the pattern does not fit a layer, or promised zeros would grow again.
            EngineError: the engine asked for is not to be had here.
            NumericError: a loss or weight is no longer finite; names the step and the layer.
            WorkerError: a training process died.
        """
        from compresskit.sparse.train_run import run_sparse

        return run_sparse(self, model, context)

    @property
    def _options(self) -> Options:
        return cast(Options, self.options)
