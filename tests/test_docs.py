"""What the documentation turns on is there, and combines; each rule that it names is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compresskit.recipe import recipe_from
from compresskit.training.faults import training_faults
from compresskit.training.rules import ROOMS, RULES, zenflow
from compresskit.training.rules.table import OBVIOUS, with_tables
from compresskit.yaml12 import parse_yaml

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("\n## ")[0]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| strategy ")]
STAGES = re.findall(r"`(\w+: \{.*?\})`", PAGE)
NAMES = {rule.name for rule in RULES}


def test_every_strategy_has_its_row() -> None:
    assert len(ROWS) == 18, "one for each way to train within memory and in time"
    assert all(row.count("|") == 6 for row in ROWS)


@pytest.mark.parametrize("text", STAGES)
def test_a_stage_of_the_page_is_one_and_combines(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ROOMS:
        if hasattr(room, "find_spec"):
            monkeypatch.setattr(room, "find_spec", lambda name: object())
    monkeypatch.setattr(zenflow, "_unknown", lambda: False)
    monkeypatch.setattr(zenflow, "_compiles", lambda: True)
    stage: dict[str, Any] = parse_yaml(text, "docs")[0]
    recipe = recipe_from({"model": "MODEL", "stages": [stage]}, {})
    assert training_faults(recipe.stages[0], "stages[0]") == []  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_rules_of_a_row_are_rules(row: str) -> None:
    named = re.findall(r"`([a-z0-9-]+)`", row.split("|")[5])
    assert set(named) <= NAMES


def test_the_page_tells_each_rule_as_it_is_now() -> None:
    """If not: ``python -m compresskit.training.rules.table docs/training.md``."""
    assert with_tables(PAGE) == PAGE
    for rule in RULES:
        assert rule.name.endswith(OBVIOUS) or f"| `{rule.name}` | `{rule.field}` | " in PAGE, rule.name
