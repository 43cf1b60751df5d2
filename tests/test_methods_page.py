"""docs/methods.md tells every method and every field as they are, and what it shows works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import compresskit.distill
import compresskit.distill.align
import compresskit.distill.placements
import compresskit.quant
import compresskit.sparse
import compresskit.sparse.structured
from compresskit.cli import main
from compresskit.cli.common import one_stage_recipe
from compresskit.data.spec import DataSpec
from compresskit.exports import EXPORTS
from compresskit.methods import FAMILIES, Family
from compresskit.methods.page import as_options, as_recipe, page, rows_of
from compresskit.options import Choice, choice_faults, option_faults
from compresskit.recipe import STAGES, Recipe, recipe_from
from compresskit.registry import Registry
from compresskit.sparse import STRUCTURED_PRUNERS
from compresskit.training.rollout import OnPolicy
from compresskit.training.trainable import TRAINABLES
from compresskit.yaml12 import parse_yaml

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
ROOMS = (
    compresskit.distill,
    compresskit.distill.align,
    compresskit.distill.placements,
    compresskit.quant,
    compresskit.sparse,
    compresskit.sparse.structured,
)
BY_TITLE = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)


def test_the_page_is_as_the_methods_are_now() -> None:
    """If not: ``python -m compresskit.methods.page docs/methods.md``."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_no_table_of_methods_is_left_out() -> None:
    tables = {table.kind for room in ROOMS for table in vars(room).values() if isinstance(table, Registry)}
    assert tables == {table.kind for family in FAMILIES for table in family.tables}


@BY_TITLE
def test_every_method_and_field_is_told(family: Family) -> None:
    section = PAGE.read_text(encoding="utf-8").partition(f"## {family.title}\n")[2].partition("\n## ")[0]
    for name, cls in family.classes():
        head = next(line for line in section.splitlines() if line.startswith(f"| **`{name}`** |"))
        assert len(re.split(r"(?<!\\)\|", head)[-2].split()) >= 3, f"{name} is not told"
        for field, _, _, meaning in rows_of(cls, family.reserved):
            assert meaning, f"{name}: Attributes: says nothing of {field}"
            assert f"`{field}` |" in section, f"{name}: {field}"


@pytest.mark.parametrize("cls", [Recipe, DataSpec, OnPolicy])
def test_every_key_is_told(cls: type[Any]) -> None:
    for name, _, _, meaning in rows_of(cls, ("origins",)):
        assert meaning, f"{cls.__name__}.{name}"


@BY_TITLE
def test_an_example_is_the_same_in_a_recipe_and_on_the_command_line(family: Family) -> None:
    written = recipe_from({"model": "MODEL", "stages": parse_yaml(as_recipe(family), "docs")[0]}, {})
    kind, cls = family.stages[0], STAGES[family.stages[0]]
    command = main.get_command(main.make_context("", ["doctor"]), kind.replace("_", "-"))
    assert command is not None
    models = ["--teacher", "T", "--student", "MODEL"] if kind == "distill" else ["MODEL"]
    typed = command.make_context(kind, [*shlex.split(as_options(family)), *models]).params
    typed = {name: value for name, value in typed.items() if name not in ("teacher", "data")}
    assert one_stage_recipe(kind, cls, "MODEL", typed).stages == written.stages


@BY_TITLE
def test_an_example_has_no_faults_of_its_own(family: Family) -> None:
    name, given = family.example
    table: Any = next(table for table in family.tables if name in table)
    options = tuple(given.items())
    if family.is_beside:
        assert option_faults(table[name], options, where="here", reserved=family.reserved) == []
    elif family.of:
        assert option_faults(STRUCTURED_PRUNERS[family.of], options, where="here") == []
    else:
        told = tuple(option for option in options if family.key != "features" or option[0] != "layers")
        assert choice_faults(Choice(name, told), table, where="here") == []


@pytest.mark.parametrize("kind", STAGES)
def test_help_names_every_method_and_no_table(kind: str) -> None:
    said = CliRunner().invoke(main, [kind.replace("_", "-"), "--help"]).output
    tables = [
        table for family in FAMILIES if kind in family.stages and not family.of for table in family.tables
    ]
    tables += [EXPORTS] + [TRAINABLES] * (kind in ("distill", "finetune"))
    words = set(re.findall(r"[\w-]+", re.sub(r"(?<=\w-)\s+", "", said)))  # lines are broken at hyphens too
    assert {name for table in tables for name in table} <= words
    assert "docs/methods.md" in said
    assert not re.search(r"compresskit\.\w", said)
