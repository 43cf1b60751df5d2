"""What a recipe says about quantisation. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError
from compresskit.quant import QUANTIZERS
from compresskit.options import Options, freeze_options, option_faults
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.modeling.source import ModelSource
    from compresskit.quant.scheme import Scheme
    from compresskit.stage import StageContext, StageResult


@dataclass(frozen=True)
class Quantize:
    """Round weights onto a grid of few bits; zeros stay zero.

    Attributes:
        method: a name of ``compresskit.quant.QUANTIZERS``.
        scheme: ``w8a8``, ``w8a16``, ``w4a16`` (groups of 128), ``w4a16-g32``, ``w4a16-channel`` ... in any case.
        targets: which layers: module names, fnmatch patterns, ``re:`` patterns or ``Linear``.
        ignore: which of those to leave alone.
        data: calibration text, for a method that reads any; None takes the recipe's.
        options: the method's own fields.
    """

    kind: ClassVar[str] = "quantize"

    method: str = "rtn"
    _: KW_ONLY
    scheme: str = "w8a8"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    data: DataSpec | None = None
    options: Mapping[str, Any] | Options = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _names(self.targets))
        object.__setattr__(self, "ignore", _names(self.ignore))
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))
        object.__setattr__(self, "options", freeze_options(self.options))

    def faults(self, anatomy: Anatomy, where: str) -> list[Fault]:
        """Everything wrong with this stage for a model of this ``anatomy``; reads no weight.

        Args:
            anatomy: of the model this stage will be given.
            where: prefix of each fault, e.g. ``recipe.yaml:7 stages[0]``.

        Returns:
            All faults together; each layer the scheme does not fit is named.
        """
        if self.method not in QUANTIZERS:
            cure = f"Did you mean: {nearest(self.method, QUANTIZERS)}?"
            return [Fault(f"{where}.method", "the name of a quantizer", repr(self.method), cure)]
        faults = option_faults(QUANTIZERS[self.method], self._options, where=where)
        return faults + self._scheme_faults(anatomy, where)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Quantise ``model`` into ``context.out``.

        Raises:
            SchemeError: the scheme does not fit a layer, or ``model`` is quantised already.
        """
        from compresskit.quant.oneshot import run_oneshot

        return run_oneshot(self, model, context)

    @property
    def _options(self) -> Options:
        return cast(Options, self.options)

    def _scheme_faults(self, anatomy: Anatomy, where: str) -> list[Fault]:
        from compresskit.quant.scheme import parse
        from compresskit.targets import select

        faults: list[Fault] = []
        try:
            scheme = parse(self.scheme, where=f"{where}.scheme")
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        try:
            layers = select(anatomy, self.targets, self.ignore, where=where)
        except InputError as error:
            return faults + [f for f in error.faults if isinstance(f, Fault)]
        faults += [_tied_fault(name, where) for name in layers if anatomy.linears[name].tied]
        if not faults:
            faults += self._fit_faults(anatomy, layers, scheme, where)
        return faults

    def _fit_faults(
        self, anatomy: Anatomy, layers: Sequence[str], scheme: Scheme, where: str
    ) -> list[Fault]:
        misfits: dict[tuple[str, int], list[str]] = {}
        for name in layers:
            linear = anatomy.linears[name]
            expected = scheme.misfit(linear.in_features)
            if expected:
                misfits.setdefault((expected, linear.in_features), []).append(name)
        return [
            Fault(
                f"{where}.scheme",
                expected,
                f"{inputs} in {', '.join(names)}",
                "Choose a group size that divides it, use one scale per row (w4a16-channel), or add these "
                "layers to ignore.",
            )
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
