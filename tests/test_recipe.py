"""Recipes: YAML and Python say the same, the resolved one runs as it is, and every fault is told at once."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

import compresskit as ck
from compresskit.errors import RecipeError
from compresskit.recipe import load_recipe
from compresskit.schema import recipe_schema

TEXT = """\
model: some/model
data: {source: text.jsonl, column: story}
seed: 3
stages:
  - prune: {method: wanda, pattern: 2:4, ignore: lm_head}
  - prune: {method: cut, layers: 3, ffn: 0.5}
  - distill: {steps: 20, learning_rate: 1e-3}
  - finetune:
  - quantize: {method: rtn, scheme: W4A16-G32}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_yaml_and_python_say_the_same(path: Path) -> None:
    recipe = ck.Recipe(
        model="some/model",
        data=ck.DataSpec(source="text.jsonl", column="story"),
        seed=3,
        stages=(
            ck.Prune("wanda", pattern="2:4"),
            ck.Prune("cut", options={"layers": 3, "ffn": 0.5}),
            ck.Distill(steps=20, learning_rate=1e-3),
            ck.Finetune(),
            ck.Quantize("rtn", scheme="W4A16-G32"),
        ),
    )
    assert load_recipe(path) == recipe
    assert hash(load_recipe(path)) == hash(recipe)


def test_the_resolved_recipe_reads_back_equal_and_safely(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert yaml.safe_load(resolved.read_text()) == recipe.to_json()


def test_the_schema_takes_what_we_take_and_refuses_what_we_refuse(path: Path) -> None:
    schema = jsonschema.Draft202012Validator(recipe_schema())
    schema.validate(load_recipe(path).to_json())
    for bad in (
        {"model": "m"},
        {"model": "m", "stages": [{"prun": {}}]},
        {"model": 1, "stages": [{"prune": {}}]},
    ):
        assert not schema.is_valid(bad)


def test_every_fault_is_told_with_its_line_and_the_nearest_names(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "modle: x\nseed: many\nstages:\n  - prun: {}\n"
        "  - distill:\n      step: 3\n      loss: 7\n  - quantize: 3\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    for part in (
        f"{path}:1 modle: expected a key of a recipe, got 'modle'. Did you mean: model",
        f"{path}:2 seed: expected a whole number, got 'many'",
        "the key model, got none",
        f"{path}:4 stages[0]",
        "Did you mean: prune",
        f"{path}:6 stages[1].step: expected a key of the stage distill",
        "steps",
        f"{path}:7 stages[1].loss: expected text or a mapping or a list",
        f"{path}:8 stages[2]",
    ):
        assert part in text, text
    assert len(caught.value.faults) == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"r\.yaml recipe: expected a mapping with the keys model and stages, got nothing"),
        ("stages: [prune: {}]\n", r"r\.yaml recipe: expected the key model"),
        ("model: m\n", "a list of stages"),
        ("model: m\nstages: []\n", "a list of stages"),
        ("model: m\nstages: [{prune: {}, distill: {}}]\n", "one key, the kind of stage"),
    ],
)
def test_shapes_that_are_no_recipe(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: expected a readable UTF-8 recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml"):
        load_recipe(tmp_path / "latin.yaml")


def test_overrides_reach_any_field_and_errors_name_the_option(path: Path) -> None:
    recipe = load_recipe(path, {"stages[2].steps": "7", "stages.1.ffn": "0.25", "seed": "9"})
    assert recipe.seed == 9
    assert recipe.stages[2] == ck.Distill(steps=7, learning_rate=1e-3)
    assert recipe.stages[1] == ck.Prune("cut", options={"layers": 3, "ffn": 0.25})
    with pytest.raises(
        RecipeError, match=r"--set stages\[2\]\.steps stages\[2\]\.steps: expected a whole number"
    ):
        load_recipe(path, {"stages[2].steps": "many"})
    with pytest.raises(RecipeError, match=r"--set stages\[9\]\.steps"):
        load_recipe(path, {"stages[9].steps": "1"})
