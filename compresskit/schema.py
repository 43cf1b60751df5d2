"""The JSON Schema of a recipe, made from the dataclasses themselves."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from compresskit.fields import is_sequence
from compresskit.recipe import STAGES, Recipe
from compresskit.stage import Json

SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def recipe_schema() -> Json:
    """A JSON Schema (2020-12) that every valid recipe satisfies."""
    schema = _object(Recipe, skip=("origins", "stages"))
    schema["properties"]["stages"] = {
        "type": "array",
        "minItems": 1,
        "items": {"oneOf": [_stage(kind) for kind in STAGES]},
    }
    schema["required"] = ["model", "stages"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compresskit recipe",
        **schema,
    }


def _stage(kind: str) -> Json:
    cls = STAGES[kind]
    body = _object(cls, skip=("options",))
    if any(f.name == "options" for f in fields(cls)):  # type: ignore[arg-type]
        body["additionalProperties"] = True
    body = {"anyOf": [body, {"type": "null"}]}
    return {"type": "object", "properties": {kind: body}, "required": [kind], "additionalProperties": False}


def _object(cls: Any, skip: tuple[str, ...] = ()) -> Json:
    hints = get_type_hints(cls)
    properties = {}
    required = []
    for field in fields(cls):
        if field.name in skip:
            continue
        properties[field.name] = _type(hints[field.name])
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


def _type(hint: Any) -> Json:
    if get_origin(hint) in (Union, types.UnionType):
        return {"anyOf": [_type(option) for option in get_args(hint)]}
    if is_sequence(hint):
        item = _type(get_args(hint)[0])
        if is_dataclass(get_args(hint)[0]):  # a mapping is short for a list of its first two fields
            return {"anyOf": [{"type": "array", "items": item}, {"type": "object"}, {"type": "string"}]}
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if get_origin(hint) is Mapping:
        return {"type": "object"}
    if is_dataclass(hint):
        return {"anyOf": [{"type": "string"}, _object(hint)]}
    return {"type": SCALARS[hint]}
