"""Every method and its fields as a page of Markdown, in the words of their docstrings.

``python -m compresskit.methods.page docs/methods.md`` writes it.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from compresskit.data.spec import DataSpec
from compresskit.fields import describe, documented
from compresskit.methods import FAMILIES, Family
from compresskit.options import bounds_of
from compresskit.recipe import Recipe
from compresskit.registry import spelt_out
from compresskit.training.rollout import OnPolicy

HEAD = """\
# Methods and their fields

<!-- python -m compresskit.methods.page docs/methods.md -->

`compresskit COMMAND --help` lists the fields of a stage; here are those of the methods that it names, and the
keys of a recipe and of `data`. Each section begins with one choice written twice: in a recipe, and as options
of the stage's command. Where a method's fields stand in a mapping, its name alone takes all defaults.
`compresskit run recipe.yaml` and `plan` take `--set stages[0].damping=0.05`, with stages counted from 0.
Fields of *all* are every method's of the section; where a method has a row of the same name, that counts.
What `trainable` and `adapter` name has no fields of its own: `rank`, `alpha` and others are the stage's.
"""
TABLE = "| method, field | default | takes | what it is |\n|---|---|---|---|\n"
PLAIN = "| key | default | takes | what it is |\n|---|---|---|---|\n"
LISTED = {"stages": "a list of mappings", "sources": "a mapping or a list of mappings"}
Row = tuple[str, str, str, str]
"""Name, default, what may be written, meaning."""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(_section, FAMILIES), _on_policy(), _recipe(), _data()])


def as_recipe(family: Family) -> str:
    """The example of ``family`` as a stage of a recipe."""
    name, given = family.example
    if family.is_beside:
        inner = _flow({family.key: name, **given})
    elif family.of:
        inner = _flow({"method": family.of, **given, family.key: name})
    else:
        inner = f"{{{family.key}: {_flow({'method': name, **given}) if given else name}}}"
    return f"- {family.stages[0]}: {inner}"


def as_options(family: Family) -> str:
    """The example of ``family`` as options of the command of its first stage."""
    name, given = family.example
    prefix = "" if family.is_beside or family.of else f"{family.key}."
    settings = [f"--set {prefix}{field}={_plain(value)}" for field, value in given.items()]
    if family.of:
        return " ".join([f"--method {family.of}", *settings, f"--set {family.key}={name}"])
    return " ".join([f"--{family.key.replace('_', '-')} {name}", *settings])


def rows_of(cls: type[Any], skip: Iterable[str] = ()) -> tuple[Row, ...]:
    """The fields of a dataclass."""
    said, hints = documented(cls), get_type_hints(cls)
    return tuple(
        (f.name, _default(f), _takes(cls, f, hints[f.name]), _markdown(said.get(f.name, "")))
        for f in fields(cls)
        if f.name not in skip
    )


def summary(cls: type[Any], *, alone: bool, whole: bool) -> str:
    """What a method is.

    Args:
        cls: its class.
        alone: whether its file has no other method; the file's first line is about it then.
        whole: whether its class's first line is wanted too, as of a loss, whose value it is.
    """
    file = (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")[0]
    own = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    return _markdown(" ".join([file] * alone + [own] * (whole or not alone)))


def _section(family: Family) -> str:
    classes = dict(family.classes())
    files = Counter(cls.__module__ for cls in classes.values())
    rows = {name: rows_of(cls, family.reserved) for name, cls in classes.items()}
    shared = _shared(rows)
    lines = [_line(f"*all*: {_code(name)}", *rest) for name, *rest in shared]
    for name, cls in classes.items():
        told = summary(cls, alone=files[cls.__module__] == 1, whole=family.several)
        lines.append(_line(f"**{_code(name)}**", "", "", told))
        lines += [_line(_code(row[0]), *row[1:]) for row in rows[name] if row not in shared]
    places = ", ".join(map(_code, family.stages)) + (f" with method {_code(family.of)}" if family.of else "")
    besides = "".join(f" Besides methods {_code(family.key)} takes {_code(name)}." for name in family.others)
    several = " A list of choices is added up." if family.several else ""
    examples = f"`{as_recipe(family)}` or `{as_options(family)}`"
    where = f"{_code(family.key)} of {places}.{besides}{several}"
    return f"## {family.title}\n\n{where}\n\n{examples}\n\n{TABLE}{''.join(lines)}"


def _shared(rows: Mapping[str, tuple[Row, ...]]) -> tuple[Row, ...]:
    """What most methods of a family have alike, of fields that all of them have."""
    if len(rows) < 2:
        return ()
    names = set.intersection(*({row[0] for row in own} for own in rows.values()))
    counted = Counter(row for own in rows.values() for row in own if row[0] in names)
    return tuple(row for row, count in counted.items() if 2 * count > len(rows))


def _on_policy() -> str:
    examples = "`- distill: {on_policy: {fraction: 0.5}}` or `--set on_policy.fraction=0.5`"
    told = f"## Text of the student's own\n\n`on_policy` of `distill`.\n\n{examples}\n"
    return f"{told}\n{_plain_table(OnPolicy)}"


def _recipe() -> str:
    told = "## Keys of a recipe\n\n`compresskit run recipe.yaml --set seed=3`\n"
    return f"{told}\n{_plain_table(Recipe, ('origins',))}"


def _data() -> str:
    told = "`data` and `evaluation` of a recipe and `data` of a stage are a source or a mapping of these."
    examples = "`data: {source: text.jsonl, column: story}` or `--data text.jsonl --set data.column=story`"
    return f"## Keys of `data`\n\n{told}\n\n{examples}\n\n{_plain_table(DataSpec)}"


def _plain_table(cls: type[Any], skip: Iterable[str] = ()) -> str:
    return PLAIN + "".join(_line(_code(name), *rest) for name, *rest in rows_of(cls, skip))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _default(f: Field[Any]) -> str:
    if f.default is MISSING and f.default_factory is MISSING:
        return "required"
    value = f.default if f.default_factory is MISSING else f.default_factory()
    return _code(_plain(value.source if isinstance(value, DataSpec) else value))


def _takes(cls: type[Any], f: Field[Any], hint: Any) -> str:
    if DataSpec in (hint, *get_args(hint)):
        return "a source or a mapping"
    if f.name in LISTED:
        return LISTED[f.name]
    words, bounds = describe(hint), bounds_of(cls, f.name)
    return words if bounds is None else f"{words}, {bounds}"


def _plain(value: Any) -> str:
    """As YAML has it on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _flow(mapping: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {_plain(value)}" for name, value in mapping.items()) + "}"


def _code(text: str) -> str:
    return f"`{text}`"


def _markdown(text: str) -> str:
    text = re.sub(r"\bNone\b", "``null``", spelt_out(text))
    return re.sub(r"(:\w+:)?(``|`)([^`]+)\2", r"`\3`", text).replace("|", r"\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
