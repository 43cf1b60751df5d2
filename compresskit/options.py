"""A method's own fields as a stage carries them: frozen, sorted, and checked against the method. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from math import inf, isfinite
from typing import Any, get_args, get_type_hints

from compresskit.errors import Fault, UnknownMethodError
from compresskit.fields import describe, fit
from compresskit.registry import Registry, nearest

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A name of a table and that class's own fields, as a recipe writes it: ``owl``, or
    ``{method: owl, spread: 0.1}``.

    Attributes:
        method: the name.
        options: from :func:`freeze_options`.
    """

    method: str
    options: Options = ()

    def __str__(self) -> str:
        return self.method

    def to_json(self) -> Any:
        """As a recipe writes it."""
        if not self.options:
            return self.method or {}
        named = {"method": self.method} if self.method else {}
        return {**named, **{name: _plain(value) for name, value in self.options}}


@dataclass(frozen=True, slots=True)
class Within:
    """The numbers a method's field may be: ``damping: Annotated[float, Within(0, 1)] = 0.01``.

    Attributes:
        least: finite, and allowed itself unless ``above``.
        most: allowed itself, where finite.
        above: whether only what is greater than ``least`` will do.
    """

    least: float
    most: float = inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            isfinite(value) and self.least <= value <= self.most and not (self.above and value == self.least)
        )

    def __str__(self) -> str:
        text = f"{'above' if self.above else 'at least'} {self.least:.10g}"
        return text if self.most == inf else f"{text} and at most {self.most:.10g}"


def freeze_options(options: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Options:
    """``options`` as pairs sorted by name: equal options are equal, and hashable.

    Of the values lists become tuples, and mappings tuples of pairs, at any depth.
    """
    return tuple(sorted((name, _frozen(value)) for name, value in dict(options).items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        by_key = sorted(value.items(), key=lambda pair: (type(pair[0]).__name__, pair[0]))
        return tuple((key, _frozen(part)) for key, part in by_key)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def choice_of(value: str | Mapping[str, Any] | Choice) -> Choice:
    """What a recipe writes, as a :class:`Choice`; a mapping that names no method has the method ``""``."""
    if isinstance(value, Choice):
        return value
    given = {"method": value} if isinstance(value, str) else dict(value)
    return Choice(str(given.pop("method", "")), freeze_options(given))


def choices_of(value: Any) -> tuple[Choice, ...]:
    """What a recipe writes where one choice or a list of them may stand."""
    several = isinstance(value, list | tuple) and not isinstance(value, Choice)
    return tuple(map(choice_of, value)) if several else (choice_of(value),)


def choice_faults(choice: Choice, table: Registry[Any], *, where: str) -> list[Fault]:
    """What is wrong with ``choice`` as a name of ``table`` and fields of the class of that name."""
    if not choice.method:
        cure = f"Write a name, or add the key method: {', '.join(table)}."
        return [Fault(where, "the key method", "a mapping without it", cure)]
    try:
        table.require(choice.method, where=where)
    except UnknownMethodError as error:
        return [fault for fault in error.faults if isinstance(fault, Fault)]
    return option_faults(table[choice.method], choice.options, where=where)


def option_faults(
    method: type[Any],
    options: Options,
    *,
    where: str,
    stage: type[Any] | None = None,
    reserved: Iterable[str] = (),
) -> list[Fault]:
    """What is wrong with ``options`` as keyword arguments of the dataclass ``method``.

    Args:
        method: a method's class; its fields are its configuration.
        options: from :func:`freeze_options`.
        where: the stage, e.g. ``stages[0]``; an option stands in a recipe beside the stage's own fields.
        stage: its class, whose fields may have been meant; None where they stand elsewhere.
        reserved: fields of ``method`` that the stage fills in by itself.

    Returns:
        One fault per unknown name, missing field or value of another type or out of its bounds.
    """
    hints = get_type_hints(method)
    known = {f.name: f for f in fields(method) if f.name not in set(reserved)}
    given = dict(options)
    faults = []
    for name, value in given.items():
        if name not in known:
            meant, expected = set(known), f"a field of {method.__name__}"
            if stage is not None:
                meant |= {f.name for f in fields(stage) if f.name != "options"}
                expected = f"a field of {stage.__name__} or of its method {method.__name__}"
            faults.append(
                Fault(f"{where}.{name}", expected, repr(name), f"Did you mean: {nearest(name, meant)}?")
            )
        elif not fit(value, hints[name])[0]:
            wanted = describe(hints[name])
            faults.append(Fault(f"{where}.{name}", wanted, repr(value), f"Write {name} as {wanted}."))
        elif (bounds := bounds_of(method, name)) is not None and value is not None and value not in bounds:
            cure = f"Leave {name} out, which is {known[name].default!r}, or choose one {bounds}."
            faults.append(Fault(f"{where}.{name}", f"a number {bounds}", repr(value), cure))
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            faults.append(
                Fault(where, f"a value for {name}", "none", f"Add {name}: {describe(hints[name])}.")
            )
    return faults


def bounds_of(method: type[Any], name: str) -> Within | None:
    """The :class:`Within` that the field ``name`` of ``method`` is annotated with."""
    notes = get_args(get_type_hints(method, include_extras=True)[name])
    return next((note for note in notes if isinstance(note, Within)), None)
