"""Taste, as tests: layering, sizes, import weight, docstrings, registries, what may not be said."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import compresskit
from compresskit.cli import COMMANDS
from compresskit.distill import FEATURE_LOSSES, LOSSES, SENTENCE_LOSSES
from compresskit.distill.align import ALIGNMENTS
from compresskit.errors import UnknownMethodError
from compresskit.quant import QUANTIZERS
from compresskit.recipe import STAGES
from compresskit.registry import Registry
from compresskit.sparse import ALLOCATIONS, PRUNERS, RECOVERIES, TRAINED_PRUNERS
from compresskit.sparse.structured import IMPORTANCES
from compresskit.training.trainable import TRAINABLES

ROOT = Path(compresskit.__file__).parent
FAMILIES = {"quant", "sparse", "distill"}
ORDER = (
    {"errors", "home", "registration"},
    {"registry", "progress", "yaml12", "timing"},
    {"fields", "kernels"},
    {"options"},
    {"data", "targets", "formats"},
    {"modeling"},
    {"hf_quantizer"},
    {"calibration"},
    {"stage"},
    {"training"},
    FAMILIES,
    {"exports"},
    {"recipe"},
    {"methods"},
    {"schema", "artifact"},
    {"foresight"},
    {"planned"},
    {"planner"},
    {"assembly"},
    {"pipeline"},
    {"measure", "assets", "caches"},
    {"reports"},
    {"api"},
    {"cli"},
    {"__main__"},
)
LAYER = {name: rank for rank, names in enumerate(ORDER) for name in names}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_COMMAND_LINES = 60
PLACES = [place for place in (ROOT.parent, Path.home()) if len(place.parts) > 1]
HERE_ONLY = "|".join(re.escape(f"{place}/") for place in PLACES)
FORBIDDEN = re.compile(HERE_ONLY + r"|\bTODO\b|\bFIXME\b")
TORCH_FREE = ("", "recipe", "schema", "fields", "options", "registry", "progress", "yaml12", "data.spec")


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Every import from this package, inside functions too, except those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compresskit."):
            yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(ast.Module(node.orelse, []))
        else:
            yield from imported(node)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for node in imported(ast.parse(path.read_text())):
        there = (node.module or "").split(".")[1]
        assert here == there or LAYER[there] < LAYER[here], f"{here} may not import {there}"
        private = [name.name for name in node.names if name.name.startswith("_")]
        assert here == there or not private, f"{private} are {there}'s own"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_siblings_do_not_name_each_others_code_in_texts(family: str) -> None:
    for path in sorted((ROOT / family).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.fullmatch(r"compresskit\.(\w+)[\w.]*(:\w+)?", node.value)
                assert not found or found[1] not in FAMILIES - {family}, f"{path}:{node.lineno} {node.value}"


def test_each_file_of_tests_has_a_name_of_its_own() -> None:
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT.parent / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    limit = (
        MAX_COMMAND_LINES
        if path.parent.name == "cli" and path.stem.replace("_", "-") in COMMANDS
        else MAX_LINES
    )
    assert text.count("\n") <= limit, f"{path}: split it"
    assert text.isascii(), f"{path}: ASCII only"
    assert not FORBIDDEN.search(text), f"{path}: {FORBIDDEN.search(text)}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            said = ast.get_docstring(node, clean=False) or ""
            lines = (node.end_lineno or 0) - node.lineno + 1 - said.count("\n")
            assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_nothing_tracked_names_a_machine() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True).stdout
    for name in names.splitlines():
        path = ROOT.parent / name
        if path.suffix in {".md", ".toml", ".yaml", ".json", ".txt", ".py"} and path.is_file():
            found = re.search(HERE_ONLY, path.read_text(errors="replace"))
            assert not found, f"{name}: {found}"


def test_importing_the_package_and_its_plain_parts_imports_no_torch() -> None:
    names = [f"compresskit.{part}".rstrip(".") for part in TORCH_FREE]
    names += ["compresskit.sparse.train", "compresskit.quant.stage", "compresskit.distill.stage"]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_does_not_import_torch(command: str) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from compresskit.cli import main;"
        f"r = CliRunner().invoke(main, {[*command.split(), '--help']});"
        "sys.exit(r.exit_code or int('torch' in sys.modules) or int('Usage' not in r.output))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def methods() -> list[tuple[str, type[Any], str]]:
    tables: list[tuple[Registry[Any], str]] = [
        (PRUNERS, "prune"),
        (IMPORTANCES, "measure"),
        (ALLOCATIONS, "fractions"),
        (RECOVERIES, "recover"),
        (TRAINED_PRUNERS, "update"),
        (QUANTIZERS, "quantize"),
        (FEATURE_LOSSES, "__call__"),
        (ALIGNMENTS, "__call__"),
        (SENTENCE_LOSSES, "__call__"),
        (TRAINABLES, "load"),
    ]
    found = [(f"{r.kind} {name}", r[name], verb) for r, verb in tables for name in r]
    return found + [(f"loss {name}", LOSSES[name], "__call__") for name in LOSSES]


@pytest.mark.parametrize(("label", "cls", "verb"), methods(), ids=[m[0] for m in methods()])
def test_every_method_documents_itself(label: str, cls: type[Any], verb: str) -> None:
    module_doc = inspect.getdoc(inspect.getmodule(cls)) or ""
    assert all(section in module_doc for section in ("Paper:", "Shapes:")), label
    verb_doc = inspect.getdoc(getattr(cls, verb)) or ""
    assert all(section in verb_doc for section in ("Args:", "Returns:")), label


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_is_frozen_and_documents_each_field(kind: str) -> None:
    from dataclasses import fields

    from compresskit.fields import documented

    cls: Any = STAGES[kind]
    assert cls.__dataclass_params__.frozen
    assert {f.name for f in fields(cls)} <= set(documented(cls)), f"{kind}: a field is not documented"


def test_every_command_is_listed_and_has_its_file() -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "cli").glob("[!_]*.py")} - {"common"}
    assert files == set(COMMANDS)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match="Did you mean: wanda"):
        PRUNERS["wnada"]
