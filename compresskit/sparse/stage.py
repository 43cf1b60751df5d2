"""What a recipe says about pruning. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.calibration.oneshot import as_names, fit_faults, length_faults, number_faults, tied_faults
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError
from compresskit.options import (
    Choice,
    Options,
    choice_faults,
    choice_of,
    freeze_options,
    option_faults,
)
from compresskit.registry import nearest
from compresskit.sparse import ALLOCATIONS, PRUNERS, RECOVERIES, STRUCTURED_PRUNERS

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Linear
    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.base import Recovery, StructuredPruner
    from compresskit.sparse.pattern import Pattern
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

ON_INDIVISIBLE = ("error", "skip", "pad")
UNIFORM = "uniform"


@dataclass(frozen=True)
class Prune:
    """Zero the weights a method finds least useful, or cut layers, neurons, heads and channels away.

    Attributes:
        method: a name of ``compresskit.sparse.PRUNERS`` or a name of
            ``compresskit.sparse.STRUCTURED_PRUNERS``.
        pattern: where zeros may go: ``50%`` or ``0.5`` (of each row), ``50%:layer`` (of the whole layer),
            ``2:4`` (keep 2 of every 4 inputs), ``50%:16x16`` (of the layer's blocks of 16 outputs by 16
            inputs, each of which goes or stays whole). A structured method has no use for it.
        allocation: how zeros are divided among layers, of a pattern that is not N:M: a name of
            ``compresskit.sparse.ALLOCATIONS``, or a mapping of ``method`` and its own fields.
        recover: what follows upon pruning each component: a name of ``compresskit.sparse.RECOVERIES``, or a
            mapping of ``method`` and its own fields; None does nothing.
        targets: which layers: module names, fnmatch patterns, ``re:`` patterns or ``Linear``.
        ignore: which of those to leave alone.
        data: calibration text; None takes the recipe's.
        samples: calibration rows, for a method that needs any.
        context_length: tokens per calibration row; None is the model's own maximum, 2048 at most.
        true_sequential: calibrate each layer on what the pruned layers before it make, also within its block;
            else, as the papers of the methods do, only on what the pruned blocks before it make.
        on_indivisible: what to do about layers the pattern does not fit: ``error``, ``skip`` them, or ``pad``
            them, as if they had more inputs (and outputs, for blocks), all zero, which are the first of the
            zeros. What is skipped or padded is told in the result's warnings.
        options: the method's own fields, e.g. ``{"layers": 3, "ffn": 0.5}`` for ``cut``.
    """

    kind: ClassVar[str] = "prune"
    trains: ClassVar[bool] = False
    zeroes: ClassVar[bool] = True

    method: str = "wanda"
    _: KW_ONLY
    pattern: str | float = "50%"
    allocation: str | Mapping[str, Any] = UNIFORM
    recover: str | Mapping[str, Any] | None = None
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    data: DataSpec | None = None
    samples: int = 128
    context_length: int | None = None
    true_sequential: bool = False
    on_indivisible: str = "error"
    options: Mapping[str, Any] | Options = ()

    def __post_init__(self) -> None:
        # YAML reads 0.5 as a number; a stage has one spelling of it, so that equal recipes are equal.
        object.__setattr__(self, "pattern", str(self.pattern))
        object.__setattr__(self, "targets", as_names(self.targets))
        object.__setattr__(self, "ignore", as_names(self.ignore))
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))
        object.__setattr__(self, "options", freeze_options(self.options))
        object.__setattr__(self, "allocation", choice_of(self.allocation))
        if self.recover is not None:
            object.__setattr__(self, "recover", choice_of(self.recover))

    @property
    def reshapes(self) -> bool:
        """Whether the method takes layers and neurons away instead of zeroing weights."""
        return self.method in STRUCTURED_PRUNERS

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[0]``.

        Returns:
            All faults together; each layer the pattern does not fit is named.
        """
        methods = [*PRUNERS, *STRUCTURED_PRUNERS]
        if self.method not in methods:
            cure = f"Did you mean: {nearest(self.method, methods)}?"
            return [Fault(f"{where}.method", "the name of a pruner", repr(self.method), cure)]
        registry: Mapping[str, type[Any]] = STRUCTURED_PRUNERS if self.reshapes else PRUNERS
        method = registry[self.method]
        faults = option_faults(method, self._options, where=where, stage=Prune, reserved=("pattern",))
        faults += number_faults(self, where) + self.skip_faults(where)
        if self.reshapes:
            return faults or self._cut_faults(method(**dict(self._options)), model, where)
        faults += (wrong := self._choice_faults(where))
        if not wrong and self.reads_data:
            faults += length_faults(self, model.config, where)
        faults += self.pattern_faults(model, where)
        return faults or self._division_faults(model, where)

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        if self.reshapes:
            forecast: Forecast = STRUCTURED_PRUNERS[self.method](**dict(self._options)).forecast(model, self)
            return forecast
        from compresskit.sparse.outlook import forecast_zeroing

        return forecast_zeroing(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Prune ``model`` into ``context.out``.

        Raises:
            PatternError: the pattern does not fit a layer, or a cut would break an earlier promise.
            StatisticError: calibration measured nothing usable.
        """
        if self.reshapes:
            cut = STRUCTURED_PRUNERS[self.method](**dict(self._options))
            return cut.run(model, context, self)
        from compresskit.sparse.oneshot import run_oneshot

        return run_oneshot(self, model, context)

    def named(self, model: Outlook | ModelSource, where: str = "prune") -> tuple[str, ...]:
        """The layers that the targets name, whether the pattern fits them or not."""
        from compresskit.targets import select

        return select(model.anatomy, self.targets, self.ignore, where=where)

    def layers(self, model: Outlook | ModelSource, where: str = "prune") -> tuple[str, ...]:
        """The layers this stage prunes, those left out that the pattern does not fit when told to skip.

        Raises:
            InputError: the pattern or the targets are wrong.
        """
        from compresskit.sparse.pattern import parse_pattern

        chosen = self.named(model, where)
        if self.on_indivisible != "skip":
            return chosen
        pattern = parse_pattern(str(self.pattern))
        return tuple(name for name in chosen if not _misfit(pattern, model.anatomy.linears[name]))

    def fitted(self, pattern: Pattern, linear: Linear) -> Pattern:
        """``pattern`` for such a layer: padded, if told to, where it does not fit."""
        return pattern.padded if self.on_indivisible == "pad" and _misfit(pattern, linear) else pattern

    def uneven(self, model: Outlook | ModelSource) -> list[str]:
        """What is told of layers that the pattern does not fit; the stage has no faults for ``model``."""
        from compresskit.modeling.checkpoint import listed
        from compresskit.sparse.pattern import parse_pattern

        pattern, linears = parse_pattern(str(self.pattern)), model.anatomy.linears
        odd = [name for name in self.named(model) if _misfit(pattern, linears[name])]
        done = "are padded with zeros" if self.on_indivisible == "pad" else "stay dense"
        return [f"{pattern} does not fit {len(odd)} layers, which {done}: {listed(odd)}."] if odd else []

    @property
    def reads_data(self) -> bool:
        """Whether this stage runs calibration text through the model; its choices have no faults."""
        method = PRUNERS[self.method]
        if method.needs or self.recover is not None:
            return True
        reads = ALLOCATIONS[self.division.method].reads
        return reads == "costs" or (reads == "scores" and not hasattr(method, "score"))

    @property
    def recovery(self) -> Recovery | None:
        """What follows upon pruning a component; its fields have no faults."""
        if self.recover is None:
            return None
        choice = cast(Choice, self.recover)
        recovery: Recovery = RECOVERIES[choice.method](**dict(choice.options))
        return recovery

    @property
    def division(self) -> Choice:
        """The allocation and its fields."""
        return cast(Choice, self.allocation)

    @property
    def _options(self) -> Options:
        return cast(Options, self.options)

    def _choice_faults(self, where: str) -> list[Fault]:
        """What is wrong with the names and fields of allocation and recovery."""
        faults = choice_faults(self.division, ALLOCATIONS, where=f"{where}.allocation")
        if self.recover is not None:
            faults += choice_faults(cast(Choice, self.recover), RECOVERIES, where=f"{where}.recover")
        return faults

    def _division_faults(self, model: Outlook, where: str) -> list[Fault]:
        """What allocation and recovery cannot do for such a pattern and ``model``."""
        from compresskit.sparse.pattern import NM, parse_pattern

        faults, pattern = [], parse_pattern(str(self.pattern))
        allocation = ALLOCATIONS[self.division.method](**dict(self.division.options))
        if self.division.method != UNIFORM:
            if isinstance(pattern, NM):
                got = f"{self.division.method} with {pattern}, whose groups all have the same zeros"
                cure = "Leave allocation out, or choose a pattern such as 60%."
                faults.append(Fault(f"{where}.allocation", UNIFORM, got, cure))
            elif expected := allocation.fault(pattern.zero_fraction):
                cure = "Choose another pattern, or another allocation."
                faults.append(Fault(f"{where}.pattern", expected, str(pattern), cure))
        if allocation.reads == "costs" and model.anatomy.head is None:
            cure = "Choose another allocation."
            faults.append(Fault(f"{where}.allocation", "a model with logits, to measure costs", "none", cure))
        quantised = [name for name in self.layers(model) if name in model.layer_schemes]
        if self.recover is not None and quantised:
            cure = "Prune and recover first, then quantise; or leave recover out."
            expected = "layers without a grid, since retraining moves weights"
            faults.append(Fault(f"{where}.recover", expected, ", ".join(quantised), cure))
        return faults

    def _unused(self, where: str) -> list[Fault]:
        """Fields that mean nothing to a structured method, and were given."""
        names = ("pattern", "allocation", "recover", "targets", "ignore", "true_sequential", "on_indivisible")
        return [
            Fault(
                f"{where}.{name}",
                f"nothing, with method {self.method}, which zeroes no weights",
                str(getattr(self, name)),
                "Leave it out, or choose another method.",
            )
            for name in names
            if getattr(self, name) != getattr(_PLAIN, name)
        ]

    def skip_faults(self, where: str) -> list[Fault]:
        """What is wrong with what to do about layers the pattern does not fit."""
        if self.on_indivisible in ON_INDIVISIBLE:
            return []
        cure = f"Did you mean: {nearest(self.on_indivisible, ON_INDIVISIBLE)}?"
        return [Fault(f"{where}.on_indivisible", "error, skip or pad", repr(self.on_indivisible), cure)]

    def _cut_faults(self, method: StructuredPruner, model: Outlook, where: str) -> list[Fault]:
        if unused := self._unused(where):
            return unused
        faults = length_faults(self, model.config, where) if method.reads_data else []
        return faults + method.faults(model, where)

    def pattern_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the pattern and the targets alone."""
        from compresskit.sparse.pattern import parse_pattern

        faults: list[Fault] = []
        try:
            pattern = parse_pattern(str(self.pattern), where=f"{where}.pattern")
            if getattr(pattern, "pad", False):
                plain = str(pattern).removesuffix(":pad")
                cure = f"Write {plain}, and set on_indivisible to pad: only layers that need it are padded."
                faults.append(Fault(f"{where}.pattern", f"{plain}", repr(self.pattern), cure))
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        try:
            layers = self.named(model, where)
        except InputError as error:
            return faults + [f for f in error.faults if isinstance(f, Fault)]
        faults += tied_faults(model.anatomy, layers, where)
        if not faults:
            faults += self._fit_faults(model, layers, pattern, where)
        return faults

    def _fit_faults(
        self, model: Outlook | ModelSource, layers: Sequence[str], pattern: Pattern, where: str
    ) -> list[Fault]:
        from compresskit.sparse.pattern import NM, RowUnstructured

        def misfit(linear: Linear) -> str:
            return _misfit(self.fitted(pattern, linear), linear)

        def size(linear: Linear) -> str:
            by_row = isinstance(pattern, NM | RowUnstructured)
            return f"{'' if by_row else f'{linear.out_features} x '}{linear.in_features}"

        linears = model.anatomy.linears
        unfit = [linears[name] for name in layers if misfit(linears[name])]
        if self.on_indivisible == "skip" and len(unfit) < len(layers):
            return []
        ways = ["skip"] if self.on_indivisible == "error" and len(unfit) < len(layers) else []
        if self.on_indivisible != "pad" and not any(_misfit(pattern.padded, linear) for linear in unfit):
            ways.append("pad")
        cure = "Choose another pattern, or add these layers to ignore."
        if ways:
            cure = f"{cure[:-1].replace(' or', '')}, or set on_indivisible to {' or '.join(ways)}."
        return fit_faults(linears, layers, misfit, where=f"{where}.pattern", cure=cure, size=size)


def _misfit(pattern: Pattern, linear: Linear) -> str:
    return pattern.misfit(linear.out_features, linear.in_features)


_PLAIN = Prune()
"""Every field at its default."""
