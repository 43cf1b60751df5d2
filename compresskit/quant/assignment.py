"""Which scheme each layer gets: one for all, others where an override says so. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compresskit.errors import Fault, InputError, SchemeError
from compresskit.quant.scheme import Scheme, parse
from compresskit.targets import DEFAULT_IGNORE, matches, select

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy

Overrides = tuple[tuple[str, str], ...]
NONE = "none"
AUTO = "auto"


def freeze_overrides(given: Mapping[str, Any] | Iterable[Any]) -> Overrides:
    """Overrides as pairs (pattern, scheme), in the order given.

    Args:
        given: a mapping, pairs, or texts ``PATTERN=SCHEME`` as typed; a scheme of None is ``none``.
    """
    if isinstance(given, str):
        given = (given,)
    pairs = given.items() if isinstance(given, Mapping) else map(_pair, given)
    return tuple((str(pattern), NONE if scheme is None else str(scheme)) for pattern, scheme in pairs)


def _pair(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, str):
        return tuple(given)  # type: ignore[return-value]
    pattern, found, scheme = given.rpartition("=")
    if not found:
        cure = "Write it as '*.down_proj=w8a16'."
        raise SchemeError(Fault("overrides", "PATTERN=SCHEME", repr(given), cure))
    return pattern, scheme


def assign(
    anatomy: Anatomy,
    scheme: Scheme,
    targets: Iterable[str],
    ignore: Iterable[str],
    overrides: Overrides = (),
    *,
    where: str = "quantize",
) -> dict[str, Scheme]:
    """The scheme of each layer to quantise, in the model's order.

    Args:
        anatomy: of the model.
        scheme: of every layer that no override names.
        targets: which layers, as in :func:`compresskit.targets.select`.
        ignore: which of those to leave alone.
        overrides: (pattern, scheme or ``none``); of those that match a layer the first counts.
        where: the stage, to name in an error.

    Returns:
        Layer name -> scheme; never empty.

    Raises:
        InputError: all faults together: a pattern that matches nothing, a scheme that is none, no layer left.
    """
    layers = select(anatomy, targets, ignore, where=where)
    faults: list[Fault] = []
    schemes = {text: _parsed(text, pattern, where, faults) for pattern, text in overrides}
    for pattern, text in overrides:
        place = f"{where}.overrides.{pattern}"
        if not any(matches(pattern, layer) for layer in layers) and not _spares(pattern, text, anatomy):
            got = f"{pattern!r}, which matches none of {len(layers)}"
            cure = "Mend the pattern, or widen targets and narrow ignore to let such layers in."
            faults.append(Fault(place, "a pattern that matches a layer to quantise", got, cure))
    if faults:
        raise InputError(*faults)
    chosen = {layer: _first(layer, overrides, schemes, scheme) for layer in layers}
    kept = {layer: form for layer, form in chosen.items() if form is not None}
    if not kept:
        cure = "Leave some layers without an override of none."
        raise InputError(Fault(f"{where}.overrides", "a layer left to quantise", "none", cure))
    return kept


def is_named(layer: str, overrides: Overrides) -> bool:
    """Whether an override says what becomes of ``layer``."""
    return any(matches(pattern, layer) for pattern, _ in overrides)


def mixture_faults(schemes: Iterable[Scheme], where: str) -> list[Fault]:
    """Why no one checkpoint can hold layers of all these ``schemes``; empty where one can."""
    forms = {str(scheme): scheme for scheme in schemes}
    nf4 = [scheme for scheme in forms.values() if scheme.number == "nf4"]
    zeros = [scheme for scheme in forms.values() if not scheme.symmetric]
    if len(forms) == 1 or not (nf4 or zeros):
        return []
    loner, why = (nf4[0], "bitsandbytes") if nf4 else (zeros[0], "compressed-tensors with zero points")
    got = ", ".join(sorted(forms))
    cure = f"Give every layer {loner}, or none."
    return [Fault(f"{where}.scheme", f"one scheme for all layers: {why} holds no others", got, cure)]


def _parsed(text: str, pattern: str, where: str, faults: list[Fault]) -> Scheme | None:
    if text.lower() == NONE:
        return None
    try:
        return parse(text, where=f"{where}.overrides.{pattern}")
    except SchemeError as error:
        faults += [fault for fault in error.faults if isinstance(fault, Fault)]
        return None


def _spares(pattern: str, text: str, anatomy: Anatomy) -> bool:
    """Whether an override only says again that a layer, such as the head, stays as it is."""
    return text.lower() == NONE and (
        pattern in DEFAULT_IGNORE or any(matches(pattern, n) for n in anatomy.linears)
    )


def _first(
    layer: str, overrides: Overrides, schemes: Mapping[str, Scheme | None], otherwise: Scheme
) -> Scheme | None:
    for pattern, text in overrides:
        if matches(pattern, layer):
            return schemes[text]
    return otherwise
