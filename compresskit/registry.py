"""Name -> class tables that cost nothing to import and can be read with grep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from compresskit.errors import Fault, UnknownMethodError

T = TypeVar("T")
NAMED = re.compile(r"(?:a name|names) of ``(compresskit[\w.]*)\.([A-Z_]+)``")
"""How a docstring says that a field takes the names of a table."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The known names closest to ``name``, or all of them, as text for an error."""
    known = sorted(names)
    return ", ".join(get_close_matches(name, known, n=3) or known)


def locate(target: str) -> Any:
    """Import ``"package.module:attribute"`` and return the attribute."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


class Registry(Mapping[str, type[T]], Generic[T]):
    """A literal table of ``name: "module:Class"``; a class is imported when looked up.

    Third parties add names through the entry-point group ``compresskit.<kind>``; a name
    in the table always wins over a plugin's.

    Raises:
        UnknownMethodError: on lookup of a name in neither; the message lists near names.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = table

    @cached_property
    def _targets(self) -> Mapping[str, str]:
        """The table and the plugins; found at first need, since it reads every package's metadata."""
        plugins = {e.name: e.value for e in entry_points(group=f"compresskit.{self.kind}")}
        return {**plugins, **self._table}

    def __getitem__(self, name: str) -> type[T]:
        self.require(name, where=self.kind)
        return cast(type[T], locate(self._targets[name]))

    def require(self, name: str, *, where: str) -> None:
        """Raise UnknownMethodError, saying ``where``, unless ``name`` is known; imports nothing."""
        if name not in self:
            raise UnknownMethodError(
                Fault(
                    where=where,
                    expected=f"the name of {'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}",
                    got=repr(name),
                    cure=f"Did you mean: {nearest(name, self._targets)}?",
                )
            )

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def spelt_out(text: str) -> str:
    """``text``, which says ``a name of`` a table by the table's own name, with the names themselves."""

    def names(found: re.Match[str]) -> str:
        return ", ".join(f"``{name}``" for name in locate(f"{found[1]}:{found[2]}"))

    return NAMED.sub(names, text)
