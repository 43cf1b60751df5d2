"""Plain data into the typed fields of a frozen dataclass, with errors that name the place. No torch."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from compresskit.errors import Fault
from compresskit.registry import nearest

SEQUENCES = (tuple, Sequence)
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def coerce(value: Any, hint: Any, where: str, into: dict[str, Any], name: str, faults: list[Fault]) -> None:
    """Store ``value`` as ``into[name]`` if it fits ``hint``, else append a Fault that says what would."""
    ok, result = fit(value, hint)
    if ok:
        into[name] = result
    elif is_sequence(hint) and is_dataclass(get_args(hint)[0]) and isinstance(value, list | tuple | Mapping):
        items: dict[str, Any] = {}
        for number, item in enumerate(_listed(value, get_args(hint)[0])):
            coerce(item, get_args(hint)[0], f"{where}[{number}]", items, str(number), faults)
        into[name] = tuple(items.values())
    elif (target := _dataclass_in(hint)) is not None and isinstance(value, Mapping):
        nested: dict[str, Any] = {}
        hints = get_type_hints(target)
        for key, item in value.items():
            if key in hints:
                coerce(item, hints[key], f"{where}.{key}", nested, key, faults)
            else:
                faults.append(Fault(where, "a known key", repr(key), f"Did you mean: {nearest(key, hints)}?"))
        missing = [name for name in _required(target) if name not in nested]
        faults += [Fault(where, f"the key {key}", "none", f"Add '{key}: ...'.") for key in missing]
        if not missing:
            into[name] = target(**nested)
    else:
        faults.append(Fault(where, describe(hint), f"{value!r}", f"Change {name}."))


def fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits the type ``hint``, and the value as that type has it."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            ok, result = fit(value, option)
            if ok:
                return ok, result
        return False, None
    if is_sequence(hint):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return False, None
        fitted = [fit(item, get_args(hint)[0]) for item in items]
        return all(ok for ok, _ in fitted), tuple(item for _, item in fitted)
    if origin is Mapping:
        return isinstance(value, Mapping), value
    if hint is Any or hint is type(None):
        return hint is Any or value is None, value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if _dataclass_in(hint) is not None:
        first = fields(hint)[0].name
        return (True, hint(**{first: value})) if isinstance(value, str) else (isinstance(value, hint), value)
    if hint is not bool and isinstance(value, bool):
        return False, None
    return (isinstance(value, hint), value) if isinstance(hint, type) else (True, value)


def is_sequence(hint: Any) -> bool:
    """Whether ``hint`` is a list or a tuple of something."""
    return get_origin(hint) in SEQUENCES


def describe(hint: Any) -> str:
    """``hint`` in words: ``int | None`` is ``a whole number or null``."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if is_sequence(hint) and is_sequence(get_args(hint)[0]):
        return "a mapping"  # as pairs, so that it can be hashed
    if is_sequence(hint):
        return f"a list of {describe(get_args(hint)[0])}"
    if origin is Mapping:
        return "a mapping"
    if is_dataclass(hint):
        return "a path or a mapping of " + ", ".join(f.name for f in fields(hint))
    return NAMES.get(hint, str(hint))


def documented(cls: type[Any]) -> dict[str, str]:
    """The ``Attributes:`` of a class and its bases: field -> what is said of it, on one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = (base.__doc__ or "").partition("Attributes:")[2]
        for name, text in re.findall(r"^ {8}(\w+): ((?:.|\n {12})*)", section, re.M):
            found[name] = re.sub(r"\s+", " ", text).strip()
    return found


def _listed(value: Any, target: Any) -> list[Any]:
    """The items of a list of ``target``; ``{a: 1, b: {...}}`` is short for one of its first two fields."""
    if not isinstance(value, Mapping):
        return list(value)
    first, second = (f.name for f in fields(target)[:2])
    return [
        {first: name, **(item if isinstance(item, Mapping) else {second: item})}
        for name, item in value.items()
    ]


def _required(target: Any) -> list[str]:
    return [f.name for f in fields(target) if f.default is MISSING and f.default_factory is MISSING]


def _dataclass_in(hint: Any) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return hint
    return next((option for option in get_args(hint) if is_dataclass(option)), None)
