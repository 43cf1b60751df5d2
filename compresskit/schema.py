"""The JSON Schema of a recipe, made from the dataclasses themselves and from the tables of methods."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from compresskit.exports import EXPORTS
from compresskit.fields import documented, is_sequence
from compresskit.methods import FAMILIES, Family
from compresskit.options import bounds_of
from compresskit.recipe import STAGES, Recipe
from compresskit.registry import spelt_out
from compresskit.stage import Json
from compresskit.training.trainable import ALL, TRAINABLES

SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def recipe_schema() -> Json:
    """A JSON Schema (2020-12) that every valid recipe satisfies; imports every method, those of plugins too.

    It refuses names and fields that no method has here, and a method's numbers out of their bounds. Whether
    what a recipe says combines is for a plan to tell.
    """
    schema = _object(Recipe, skip=("origins", "stages"))
    export = {"enum": list(EXPORTS)}
    schema["properties"]["export"] = {"anyOf": [export, {"type": "array", "items": export}]}
    schema["properties"]["stages"] = {
        "type": "array",
        "minItems": 1,
        "items": {"oneOf": [{"enum": list(STAGES)}, *map(_stage, STAGES)]},
    }
    schema["required"] = ["model", "stages"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compresskit recipe",
        **schema,
        "$defs": {_kinds(told): _one_of(told) for kind in STAGES for told in _named(kind).values()},
    }


def _stage(kind: str) -> Json:
    cls: Any = STAGES[kind]
    body = _object(cls, skip=("options",))
    hints, known = get_type_hints(cls), body["properties"]
    for key, families in _named(kind).items():
        one = {"$ref": f"#/$defs/{_kinds(families)}"}
        forms = [one, {"type": "array", "items": one}] if any(f.several for f in families) else [one]
        forms += [{"type": "null"}] * (type(None) in get_args(hints[key]))
        known[key] = _about(known[key], {"anyOf": forms})
    if "trainable" in known:
        known["trainable"] = _about(known["trainable"], {"enum": [ALL, *TRAINABLES]})
    if "on_policy" in known:
        from compresskit.training.rollout import OnPolicy

        known["on_policy"] = _about(known["on_policy"], {"anyOf": [_object(OnPolicy), {"type": "null"}]})
    for family in FAMILIES:
        if kind in family.stages and family.is_beside:
            known["options"] = {"type": "object"}
            known["method"] = _about(known["method"], {"enum": [name for t in family.tables for name in t]})
            del body["additionalProperties"]  # which looks at no branch
            body |= _fields_by_name(family.classes(), family.reserved, default=cls.method)
    body = {"anyOf": [body, {"type": "null"}]}
    return {"type": "object", "properties": {kind: body}, "required": [kind], "additionalProperties": False}


def _named(kind: str) -> dict[str, list[Family]]:
    """The fields of a stage that name a method in a mapping of its own, with the families to choose from."""
    found: dict[str, list[Family]] = {}
    for family in FAMILIES:
        if kind in family.stages and not family.is_beside and not family.of:
            found.setdefault(family.key, []).append(family)
    return found


def _kinds(families: Iterable[Family]) -> str:
    return "-or-".join(table.kind.replace(" ", "-") for family in families for table in family.tables)


def _one_of(families: Iterable[Family]) -> Json:
    """A name, or a mapping of ``method`` and that method's own fields."""
    classes = [named for family in families for named in family.classes()]
    names = {"enum": [*dict(classes), *(name for family in families for name in family.others)]}
    mapping = {"type": "object", "properties": {"method": names}, "required": ["method"]}
    return {"anyOf": [names, mapping | _fields_by_name(classes)]}


def _fields_by_name(
    classes: Iterable[tuple[str, type[Any]]], reserved: tuple[str, ...] = (), default: str = ""
) -> Json:
    """What a mapping may have beside its other keys, by the method that it names or has by ``default``."""
    branches = []
    for name, cls in classes:
        own = _object(cls, skip=reserved)
        for family in FAMILIES:
            if family.of == name:
                values = {"enum": [value for table in family.tables for value in table]}
                own["properties"][family.key] = _about(own["properties"][family.key], values)
        chosen = {"properties": {"method": {"const": name}}} | (
            {} if name == default else {"required": ["method"]}
        )
        branches.append(
            {"if": chosen, "then": {"properties": own["properties"], "required": own["required"]}}
        )
    return {"allOf": branches, "unevaluatedProperties": False}


def _about(before: Json, values: Json) -> Json:
    """The field whose schema was ``before``, with other ``values``."""
    return {key: before[key] for key in ("description", "default") if key in before} | values


def _object(cls: Any, skip: tuple[str, ...] = ()) -> Json:
    hints, said = get_type_hints(cls), documented(cls)
    properties = {}
    required = []
    for field in fields(cls):
        if field.name in skip:
            continue
        properties[field.name] = _type(hints[field.name]) | _bounds(cls, field.name)
        if field.name in said:
            properties[field.name]["description"] = spelt_out(said[field.name]).replace("``", "`")
        if field.default is not MISSING and isinstance(field.default, str | int | float | bool):
            properties[field.name]["default"] = field.default
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _bounds(cls: Any, name: str) -> Json:
    """Of a number; what else the field takes is not touched by them."""
    bounds = bounds_of(cls, name)
    if bounds is None:
        return {}
    least = {"exclusiveMinimum" if bounds.above else "minimum": bounds.least}
    return least if bounds.most == float("inf") else least | {"maximum": bounds.most}


def _type(hint: Any) -> Json:
    if get_origin(hint) in (Union, types.UnionType):
        return {"anyOf": [_type(option) for option in get_args(hint)]}
    if is_sequence(hint):
        item = _type(get_args(hint)[0])
        # A mapping is short for a list of the first two fields of a dataclass, and for pairs.
        if is_dataclass(get_args(hint)[0]) or is_sequence(get_args(hint)[0]):
            return {"anyOf": [{"type": "array", "items": item}, {"type": "object"}, {"type": "string"}]}
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if get_origin(hint) is Mapping:
        return {"type": "object"}
    if is_dataclass(hint):
        return {"anyOf": [{"type": "string"}, _object(hint)]}
    return {"type": SCALARS[hint]} if hint in SCALARS else {}
