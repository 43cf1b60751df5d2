"""YAML as people mean it: the YAML 1.2 core scalars, line numbers kept, duplicate keys refused.

PyYAML reads YAML 1.1, in which ``2:4`` is the number 124, ``1e-3`` is text and ``no`` is false.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from compresskit.errors import Fault, RecipeError


class _Core(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own protocol


class _Both(yaml.SafeDumper):
    """SafeDumper that also quotes what only YAML 1.2 would take for something other than text."""


CORE_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in CORE_SCALARS.items():
    _Core.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_pattern})$"),
        [*_first] + ([""] if _tag == "null" else []),
    )
_Core.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_scalar = any(re.fullmatch(pattern, text) for pattern, _ in CORE_SCALARS.values())
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if is_scalar else None)


_Both.add_representer(str, _represent_text)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """Parse one YAML document.

    Args:
        text: the document.
        name: of the file, for errors.

    Returns:
        Plain data, and the line (from 1) of every path such as ``stages[0].prune.pattern``.

    Raises:
        RecipeError: not YAML, a tag other than the core ones, or a key given twice.
    """
    loader = _Core(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if node is None:
            return None, lines
        _collect(node, "", lines, name)
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(Fault(where, "a YAML document", problem, "Mend the YAML.")) from error
    finally:
        loader.dispose()


def _collect(node: yaml.Node, path: str, lines: dict[str, int], name: str) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect(item, f"{path}[{index}]", lines, name)
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            here = f"{path}.{key.value}" if path else str(key.value)
            if here in lines:
                raise RecipeError(
                    Fault(
                        f"{name}:{key.start_mark.line + 1}",
                        "each key once",
                        f"{key.value!r} again",
                        "Drop one.",
                    )
                )
            _collect(item, here, lines, name)
            lines[here] = key.start_mark.line + 1


def dump_yaml(data: Any) -> str:
    """``data`` as YAML that readers of YAML 1.1 and 1.2 understand alike."""
    return yaml.dump(data, Dumper=_Both, sort_keys=False, allow_unicode=True, width=110)
