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
    is_named,
    mixture_faults,
)
from compresskit.quant.known import Known, known
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
        if self.is_auto or QUANTIZERS[self.method].needs:
            return True
        texts = [self.scheme, *(text for _, text in self._overrides)]
        return any(parse(text).static for text in texts if text.lower() != NONE)

    @property
    def is_auto(self) -> bool:
        """Whether schemes are chosen from the candidates when the stage runs."""
        return self.scheme.lower() == AUTO

    @property
    def _overrides(self) -> Overrides:
        return cast(Overrides, self.overrides)

    def possible(self, anatomy: Anatomy, where: str = "quantize") -> dict[str, tuple[Scheme, ...]]:
        """Every scheme that each layer this stage quantises may get.

        Returns:
            Layer -> its one scheme; for ``auto``, where no override names the layer, all candidates that fit
            it, those of the least bits first: none where none fits.

        Raises:
            InputError: a scheme or a pattern is wrong.
        """
        texts = self.candidates if self.is_auto else (self.scheme,)
        schemes = [parse(text, where=f"{where}.scheme") for text in texts]
        given = assign(anatomy, schemes[0], self.targets, self.ignore, self._overrides, where=where)
        found: dict[str, tuple[Scheme, ...]] = {layer: (scheme,) for layer, scheme in given.items()}
        if not self.is_auto:
            return found
        schemes.sort(key=lambda s: s.bits_per_weight(1 << 20, 16))
        for layer in (n for n in given if not is_named(n, self._overrides)):
            inputs = anatomy.linears[layer].in_features
            found[layer] = tuple(s for s in schemes if not s.misfit(inputs))
        return found

    def schemes(self, anatomy: Anatomy, where: str = "quantize") -> dict[str, Scheme]:
        """The scheme of each layer this stage quantises; not for ``auto``.

        Raises:
            InputError: a scheme or a pattern is wrong.
        """
        return {layer: schemes[0] for layer, schemes in self.possible(anatomy, where).items()}

    def scheme_faults(self, model: Outlook | ModelSource, where: str) -> list[Fault]:
        """What is wrong with the schemes and the targets alone."""
        facts = known(model)
        linears, faults, possible = facts.anatomy.linears, self._field_faults(where), {}
        # With a scheme that is none, the patterns are looked at all the same.
        stage = replace(self, scheme="w8a8") if faults else self
        try:
            possible = stage.possible(facts.anatomy, where)
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        if faults:
            return faults
        layers = list(possible)
        faults += tied_faults(facts.anatomy, layers, where)
        if conv := [name for name in layers if linears[name].transposed]:
            faults.append(_transposed_fault(conv, where))
        if again := [name for name in layers if name in facts.quantised]:
            faults.append(_again_fault(again, where))
        if faults:
            return faults
        faults += self._method_faults(possible, where)
        faults += _nf4_faults(facts, possible, where)
        together = [*facts.quantised.values(), *possible.values()]
        faults += mixture_faults([scheme for schemes in together for scheme in schemes], where)
        cure = (
            "Choose a group size that divides it, use one scale per row (w4a16-channel), or name another "
            "scheme for these layers in overrides."
        )
        faults += fit_faults(
            linears,
            layers,
            lambda ln: next((lack for s in possible[ln.name] if (lack := s.misfit(ln.in_features))), ""),
            where=f"{where}.scheme",
            cure=cure,
        )
        if self.is_auto:
            from compresskit.quant.auto import possible_faults

            faults += possible_faults(possible, facts, cast(float, self.target_bits), where)
        return faults

    def _method_faults(self, possible: Mapping[str, Sequence[Scheme]], where: str) -> list[Fault]:
        """What is wrong with the schemes for the method alone; one fault for each scheme."""
        misfit = getattr(QUANTIZERS[self.method], "misfit", None)
        if misfit is None:
            return []
        used: dict[Scheme, str] = {}
        for name, schemes in possible.items():
            for scheme in schemes:
                used.setdefault(scheme, name)
        cure = (
            f"Choose another scheme or another method than {self.method}, or override these layers with none."
        )
        return [
            Fault(f"{where}.scheme", expected, f"{scheme} ({name})", cure)
            for scheme, name in used.items()
            if (expected := misfit(scheme))
        ]

    def _field_faults(self, where: str) -> list[Fault]:
        """What is wrong with the scheme and the fields of ``auto``, whatever the model."""
        faults: list[Fault] = []
        if self.is_auto == (self.target_bits is None):
            expected = "a number of bits, such as 4.5" if self.is_auto else "nothing, unless scheme is auto"
            cure = "Set target_bits." if self.is_auto else "Leave target_bits out, or set scheme: auto."
            faults.append(Fault(f"{where}.target_bits", expected, str(self.target_bits), cure))
        if self.is_auto:
            from compresskit.quant.auto import candidate_faults

            return faults + candidate_faults(self.candidates, self.target_bits, where)
        try:
            parse(self.scheme, where=f"{where}.scheme")
        except InputError as error:
            faults += [f for f in error.faults if isinstance(f, Fault)]
        return faults


def _nf4_faults(facts: Known, possible: Mapping[str, Sequence[Scheme]], where: str) -> list[Fault]:
    """What keeps bitsandbytes from running the layers that are to be nf4."""
    layers = [name for name, schemes in possible.items() if any(s.number == "nf4" for s in schemes)]
    if not layers:
        return []
    if find_spec("bitsandbytes") is None:
        cure = "Install it: pip install 'compresskit[qlora]'."
        return [Fault(f"{where}.scheme", "the package bitsandbytes", "not installed", cure)]
    linears = facts.anatomy.linears
    odd = [f"{n} ({linears[n].out_features})" for n in layers if linears[n].out_features % NF4_CPU_ROWS]
    if not odd or facts.device != "cpu":
        return []
    expected = f"out_features divisible by {NF4_CPU_ROWS}, as bitsandbytes' CPU kernel needs them for nf4"
    cure = "Give these layers an override of none, or quantise them with an integer scheme."
    return [Fault(f"{where}.scheme", expected, ", ".join(odd), cure)]


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
