"""What a recipe says about quantisation. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.calibration.oneshot import as_names, fit_faults, length_faults, number_faults, tied_faults
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError
from compresskit.options import Options, freeze_options, option_faults
from compresskit.quant import QUANTIZERS
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult


@dataclass(frozen=True)
class Quantize:
    """Round weights onto a grid of few bits; zeros stay zero.

    Attributes:
        method: a name of ``compresskit.quant.QUANTIZERS``.
        scheme: ``w8a8``, ``w8a16``, ``w4a16`` (groups of 128), ``w4a16-g32``, ``w4a16-channel``, in any case.
        targets: which layers: module names, fnmatch patterns, ``re:`` patterns or ``Linear``.
        ignore: which of those to leave alone.
        data: calibration text, for a method that reads any; None takes the recipe's.
        samples: calibration rows, for a method that needs any.
        context_length: tokens per calibration row; None is the model's own maximum, 2048 at most.
        options: the method's own fields.
    """

    kind: ClassVar[str] = "quantize"
    trains: ClassVar[bool] = False

    method: str = "rtn"
    _: KW_ONLY
    scheme: str = "w8a8"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    data: DataSpec | None = None
    samples: int = 128
    context_length: int | None = None
    options: Mapping[str, Any] | Options = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_names(self.targets))
        object.__setattr__(self, "ignore", as_names(self.ignore))
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))
        object.__setattr__(self, "options", freeze_options(self.options))

    @property
    def reshapes(self) -> bool:
        """False: quantisation changes values, not shapes."""
        return False

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[0]``.

        Returns:
            All faults together; each layer the scheme does not fit is named.
        """
        if self.method not in QUANTIZERS:
            cure = f"Did you mean: {nearest(self.method, QUANTIZERS)}?"
            return [Fault(f"{where}.method", "the name of a quantizer", repr(self.method), cure)]
        method = QUANTIZERS[self.method]
        faults = option_faults(method, self._options, where=where, stage=Quantize)
        faults += number_faults(self, where)
        if method.needs:
            faults += length_faults(self, model.config, where)
        return faults + self.scheme_faults(model, where)

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.quant.outlook import forecast_rounding

        return forecast_rounding(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Quantise ``model`` into ``context.out``.

        Raises:
            SchemeError: the scheme does not fit a layer, or ``model`` is quantised already.
            StatisticError: calibration measured nothing usable.
        """
        from compresskit.quant.oneshot import run_oneshot

        return run_oneshot(self, model, context)

    @property
    def _options(self) -> Options:
        return cast(Options, self.options)

    def scheme_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the scheme and the targets alone."""
        from compresskit.quant.scheme import parse
        from compresskit.targets import select

        linears = model.anatomy.linears
        faults: list[Fault] = []
        try:
            scheme = parse(self.scheme, where=f"{where}.scheme")
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        try:
            layers = select(model.anatomy, self.targets, self.ignore, where=where)
        except InputError as error:
            return faults + [f for f in error.faults if isinstance(f, Fault)]
        faults += tied_faults(model.anatomy, layers, where)
        if conv := [name for name in layers if linears[name].transposed]:
            faults.append(_transposed_fault(conv, where))
        if again := [name for name in layers if _has_grid(model, name)]:
            faults.append(_again_fault(again, where))
        if not faults:
            cure = (
                "Choose a group size that divides it, use one scale per row (w4a16-channel), or add these "
                "layers to ignore."
            )
            faults += fit_faults(
                linears, layers, lambda ln: scheme.misfit(ln.in_features), where=f"{where}.scheme", cure=cure
            )
        return faults


def _has_grid(model: Outlook | ModelSource, layer: str) -> bool:
    bits = getattr(model, "layer_bits", None)
    return layer in bits if bits is not None else model.grid(layer) is not None  # type: ignore[union-attr]


def _transposed_fault(names: Sequence[str], where: str) -> Fault:
    return Fault(
        f"{where}.targets",
        "layers of class torch.nn.Linear, the only ones that compressed-tensors packs",
        f"Conv1D in {', '.join(names)}",
        "Add these layers to ignore, or leave this stage out for such a model.",
    )


def _again_fault(names: Sequence[str], where: str) -> Fault:
    return Fault(
        f"{where}.targets",
        "layers that are not quantised yet",
        f"a grid already on {', '.join(names)}",
        "Quantise each layer once: drop one of the stages, or narrow its targets.",
    )
