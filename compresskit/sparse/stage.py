"""What a recipe says about pruning. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError
from compresskit.options import Options, freeze_options, option_faults
from compresskit.registry import nearest
from compresskit.sparse import PRUNERS, STRUCTURED_PRUNERS

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.pattern import Pattern
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

ON_INDIVISIBLE = ("error", "skip")


@dataclass(frozen=True)
class Prune:
    """Zero the weights a method finds least useful, or cut whole layers and neurons away.

    Attributes:
        method: a name of ``compresskit.sparse.PRUNERS`` or ``STRUCTURED_PRUNERS``.
        pattern: where zeros may go: ``50%`` or ``0.5`` (of each row), ``50%:layer`` (of the whole layer),
            ``2:4`` (keep 2 of every 4 inputs). A structured method has no use for it.
        targets: which layers: module names, fnmatch patterns, ``re:`` patterns or ``Linear``.
        ignore: which of those to leave alone.
        data: calibration text; None takes the recipe's.
        samples: calibration rows, for a method that needs any.
        context_length: tokens per calibration row; None is the model's own maximum, 2048 at most.
        on_indivisible: what to do about layers the pattern does not fit: ``error``, or ``skip`` them, which
            is told in the result's warnings.
        options: the method's own fields, e.g. ``{"layers": 3, "ffn": 0.5}`` for ``cut``.
    """

    kind: ClassVar[str] = "prune"
    trains: ClassVar[bool] = False

    method: str = "wanda"
    _: KW_ONLY
    pattern: str = "50%"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    data: DataSpec | None = None
    samples: int = 128
    context_length: int | None = None
    on_indivisible: str = "error"
    options: Mapping[str, Any] | Options = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _names(self.targets))
        object.__setattr__(self, "ignore", _names(self.ignore))
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))
        object.__setattr__(self, "options", freeze_options(self.options))

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
        faults += self._number_faults(where)
        if self.reshapes:
            return faults or list(method(**dict(self._options)).faults(model, where))
        return faults + self._length_faults(model, where) + self.pattern_faults(model, where)

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        if self.reshapes:
            forecast: Forecast = STRUCTURED_PRUNERS[self.method](**dict(self._options)).forecast(model)
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
            result: StageResult = STRUCTURED_PRUNERS[self.method](**dict(self._options)).run(model, context)
            return result
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

        linears, chosen = model.anatomy.linears, self.named(model, where)
        if self.on_indivisible != "skip":
            return chosen
        pattern = parse_pattern(self.pattern)
        return tuple(n for n in chosen if not pattern.misfit(linears[n].out_features, linears[n].in_features))

    @property
    def _options(self) -> Options:
        return cast(Options, self.options)

    def _number_faults(self, where: str) -> list[Fault]:
        faults = []
        for name in ("samples", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(Fault(f"{where}.{name}", "at least 1", str(value), f"Raise {name}."))
        if self.on_indivisible not in ON_INDIVISIBLE:
            cure = f"Did you mean: {nearest(self.on_indivisible, ON_INDIVISIBLE)}?"
            faults.append(Fault(f"{where}.on_indivisible", "error or skip", repr(self.on_indivisible), cure))
        return faults

    def _length_faults(self, model: Outlook, where: str) -> list[Fault]:
        from compresskit.modeling import context_length

        limit = context_length(model.config)
        if (self.context_length or 0) <= limit:
            return []
        expected, got = f"at most {limit}, the model's own maximum", str(self.context_length)
        return [Fault(f"{where}.context_length", expected, got, "Lower context_length.")]

    def pattern_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the pattern and the targets alone."""
        from compresskit.sparse.pattern import parse_pattern

        faults: list[Fault] = []
        try:
            pattern = parse_pattern(self.pattern, where=f"{where}.pattern")
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        try:
            layers = self.named(model, where)
        except InputError as error:
            return faults + [f for f in error.faults if isinstance(f, Fault)]
        faults += [_tied_fault(name, where) for name in layers if model.anatomy.linears[name].tied]
        if not faults:
            faults += self._fit_faults(model, layers, pattern, where)
        return faults

    def _fit_faults(
        self, model: Outlook | ModelSource, layers: Sequence[str], pattern: Pattern, where: str
    ) -> list[Fault]:
        misfits: dict[tuple[str, int], list[str]] = {}
        for name in layers:
            linear = model.anatomy.linears[name]
            expected = pattern.misfit(linear.out_features, linear.in_features)
            if expected:
                misfits.setdefault((expected, linear.in_features), []).append(name)
        unfit = sum(len(names) for names in misfits.values())
        if self.on_indivisible == "skip" and unfit < len(layers):
            return []
        cure = "Choose another pattern, add these layers to ignore"
        cure += "." if unfit == len(layers) else ", or set on_indivisible to skip."
        return [
            Fault(f"{where}.pattern", expected, f"{inputs} in {', '.join(names)}", cure)
            for (expected, inputs), names in misfits.items()
        ]


def _names(value: Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _tied_fault(name: str, where: str) -> Fault:
    return Fault(
        f"{where}.targets",
        "layers with weights of their own",
        f"{name}, which shares its weight with the token embedding",
        f"Add {name} to ignore.",
    )
