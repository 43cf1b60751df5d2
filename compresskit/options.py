"""A method's own fields as a stage carries them: frozen, sorted, and checked against the method. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from compresskit.errors import Fault
from compresskit.fields import describe, fit
from compresskit.registry import nearest

Options = tuple[tuple[str, Any], ...]


def freeze_options(options: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Options:
    """``options`` as pairs sorted by name, lists as tuples: equal options are equal, and hashable."""
    pairs = dict(options).items()
    return tuple(sorted((name, tuple(v) if isinstance(v, list) else v) for name, v in pairs))


def option_faults(
    method: type[Any], options: Options, *, where: str, stage: type[Any], reserved: Iterable[str] = ()
) -> list[Fault]:
    """What is wrong with ``options`` as keyword arguments of the dataclass ``method``.

    Args:
        method: a method's class; its fields are its configuration.
        options: from :func:`freeze_options`.
        where: the stage, e.g. ``stages[0]``; an option stands in a recipe beside the stage's own fields.
        stage: its class, whose fields may have been meant.
        reserved: fields of ``method`` that the stage fills in by itself.

    Returns:
        One fault per unknown name, missing field or value of another type.
    """
    hints = get_type_hints(method)
    known = {f.name: f for f in fields(method) if f.name not in set(reserved)}
    given = dict(options)
    faults = []
    for name, value in given.items():
        if name not in known:
            meant = {*known, *(f.name for f in fields(stage) if f.name != "options")}
            expected = f"a field of {stage.__name__} or of its method {method.__name__}"
            faults.append(
                Fault(f"{where}.{name}", expected, repr(name), f"Did you mean: {nearest(name, meant)}?")
            )
        elif not fit(value, hints[name])[0]:
            wanted = describe(hints[name])
            faults.append(Fault(f"{where}.{name}", wanted, repr(value), f"Write {name} as {wanted}."))
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            faults.append(
                Fault(where, f"a value for {name}", "none", f"Add {name}: {describe(hints[name])}.")
            )
    return faults
