"""What a recipe says about quantisation. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.calibration.oneshot import as_names, fit_faults, length_faults, number_faults, tied_faults
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError
from compresskit.options import Options, freeze_options, option_faults
from compresskit.quant import QUANTIZERS
from compresskit.quant.assignment import (
    AUTO,
    NONE,
    Overrides,
    assign,
    freeze_overrides,
    mixture_faults,
)
from compresskit.quant.scheme import Scheme, parse
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

NF4_CPU_ROWS = 32


@dataclass(frozen=True)
class Quantize:
    """Round weights onto a grid of few bits; zeros stay zero.

    Attributes:
        method: a name of ``compresskit.quant.QUANTIZERS``.
        scheme: ``w8a8``, ``w8a8-static``, ``w8a16``, ``w4a16`` (groups of 128), ``w4a16-g32``,
            ``w4a16-g32-asym``, ``w4a16-channel``, ``w4a8``, ``fp8``, ``nf4``, in any case; or ``auto``.
        overrides: pattern -> another scheme, or none; of those that match a layer the first counts.
        target_bits: for ``auto``: bits of a stored weight on average over the layers, scales included.
        candidates: for ``auto``: the schemes to choose from, layer by layer, by what each costs in quality.
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
    overrides: Mapping[str, Any] | tuple[str, ...] = ()
    target_bits: float | None = None
    candidates: tuple[str, ...] = ("w4a16", "w8a16")
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    data: DataSpec | None = None
    samples: int = 128
    context_length: int | None = None
    options: Mapping[str, Any] | Options = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_names(self.targets))
        object.__setattr__(self, "ignore", as_names(self.ignore))
        object.__setattr__(self, "candidates", as_names(self.candidates))
        object.__setattr__(self, "overrides", freeze_overrides(self.overrides))
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
        faults += (wrong := self.scheme_faults(model, where))
        if not wrong and self.reads_data:
            faults += length_faults(self, model.config, where)
        return faults

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

    @property
    def reads_data(self) -> bool:
        """Whether this stage runs calibration text through the model."""
        if self.scheme.lower() == AUTO or QUANTIZERS[self.method].needs:
            return True
        texts = [self.scheme, *(text for _, text in self._overrides)]
        return any(parse(text).static for text in texts if text.lower() != NONE)

    @property
    def _first_scheme(self) -> str:
        return self.candidates[0] if self.scheme.lower() == AUTO and self.candidates else self.scheme

    @property
    def _overrides(self) -> Overrides:
        return cast(Overrides, self.overrides)

    def schemes(self, anatomy: Anatomy, where: str = "quantize") -> dict[str, Scheme]:
        """The scheme of each layer this stage quantises; for ``auto`` the first candidate of each.

        Raises:
            InputError: a scheme or a pattern is wrong.
        """
        scheme = parse(self._first_scheme, where=f"{where}.scheme")
        return assign(anatomy, scheme, self.targets, self.ignore, self._overrides, where=where)

    def scheme_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the schemes and the targets alone."""
        linears = model.anatomy.linears
        faults = self._auto_faults(where)
        stage = self
        try:
            parse(self._first_scheme, where=f"{where}.scheme")
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
            stage = replace(self, scheme="w8a8")  # so that what else is wrong is told with it
        try:
            schemes = stage.schemes(model.anatomy, where)
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        if faults:
            return faults
        layers = list(schemes)
        faults += tied_faults(model.anatomy, layers, where)
        if conv := [name for name in layers if linears[name].transposed]:
            faults.append(_transposed_fault(conv, where))
        if again := [name for name in layers if _has_grid(model, name)]:
            faults.append(_again_fault(again, where))
        if faults:
            return faults
        faults += self._method_faults(schemes, where)
        if self.scheme.lower() == AUTO:
            return faults + self._fitting_faults(model, layers, where)
        faults += _nf4_faults(model, schemes, where)
        before = getattr(model, "layer_schemes", {})
        faults += mixture_faults({**{n: parse(texts[0]) for n, texts in before.items()}, **schemes}, where)
        cure = (
            "Choose a group size that divides it, use one scale per row (w4a16-channel), or name another "
            "scheme for these layers in overrides."
        )
        return faults + fit_faults(
            linears,
            layers,
            lambda ln: schemes[ln.name].misfit(ln.in_features),
            where=f"{where}.scheme",
            cure=cure,
        )

    def _method_faults(self, schemes: Mapping[str, Scheme], where: str) -> list[Fault]:
        """What is wrong with the schemes for the method alone; one fault for each scheme."""
        misfit = getattr(QUANTIZERS[self.method], "misfit", None)
        if misfit is None:
            return []
        used: dict[str, str] = {}
        for name, scheme in schemes.items():
            used.setdefault(str(scheme), name)
        if self.scheme.lower() == AUTO:
            used |= dict.fromkeys(self.candidates, "candidates")
        cure = (
            f"Choose another scheme or another method than {self.method}, or override these layers with none."
        )
        return [
            Fault(f"{where}.scheme", expected, f"{text} ({name})", cure)
            for text, name in used.items()
            if (expected := misfit(parse(text)))
        ]

    def _fitting_faults(self, model: Outlook | ModelSource, layers: Sequence[str], where: str) -> list[Fault]:
        """What is wrong with the candidates for these layers, and with a target they cannot meet."""
        from compresskit.quant.auto import budget_faults, fitting, least_bits

        try:
            fits = fitting(model.anatomy, layers, self.candidates, where)
        except InputError as error:
            return [f for f in error.faults if isinstance(f, Fault)]
        scale_bits = round(8 * getattr(model, "weight_bytes", 2))
        least = least_bits(model.anatomy, fits, scale_bits)
        return [] if self.overrides else budget_faults(least, cast(float, self.target_bits), where)

    def _auto_faults(self, where: str) -> list[Fault]:
        """What is wrong with the fields of ``auto``, whatever the model."""
        is_auto, bits = self.scheme.lower() == AUTO, self.target_bits
        if is_auto == (bits is None):
            expected = "a number of bits, such as 4.5" if is_auto else "nothing, unless scheme is auto"
            cure = "Set target_bits." if is_auto else "Leave target_bits out, or set scheme: auto."
            return [Fault(f"{where}.target_bits", expected, str(bits), cure)]
        if not is_auto:
            return []
        from compresskit.quant.auto import candidate_faults

        return candidate_faults(self.candidates, cast(float, bits), where)


def _nf4_faults(model: Outlook | ModelSource, schemes: Mapping[str, Scheme], where: str) -> list[Fault]:
    """What keeps bitsandbytes from running the layers that are to be nf4."""
    layers = [name for name, scheme in schemes.items() if scheme.number == "nf4"]
    if not layers:
        return []
    if find_spec("bitsandbytes") is None:
        cure = "Install it: pip install 'compresskit[qlora]'."
        return [Fault(f"{where}.scheme", "the package bitsandbytes", "not installed", cure)]
    linears = model.anatomy.linears
    odd = [f"{n} ({linears[n].out_features})" for n in layers if linears[n].out_features % NF4_CPU_ROWS]
    if not odd or getattr(model, "device", "cpu") != "cpu":
        return []
    expected = f"out_features divisible by {NF4_CPU_ROWS}, as bitsandbytes' CPU kernel needs them for nf4"
    cure = "Give these layers an override of none, or quantise them with an integer scheme."
    return [Fault(f"{where}.scheme", expected, ", ".join(odd), cure)]


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
