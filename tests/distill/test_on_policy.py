"""On-policy distillation in recipes: what it refuses, and that it trains."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from marked import save_marked
from test_align_stages import told
from test_stages import FEW, run
from tiny import byte_tokenizer, stories, tiny_llama
from transformers import BertConfig, BertModel

from compresskit.data.spec import DataSpec
from compresskit.distill.stage import Distill
from compresskit.errors import RecipeError
from compresskit.modeling import open_model
from compresskit.recipe import Recipe, recipe_from
from compresskit.training.rollout import OnPolicy
from compresskit.training.watch import LOSSES, LossLog

POLICY = {"fraction": 0.5, "max_new_tokens": 8}


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    path = tmp_path / "text.txt"
    path.write_text(stories())
    return DataSpec(source=str(path))


@pytest.fixture
def dialogues(tmp_path: Path) -> DataSpec:
    path = tmp_path / "chat.jsonl"
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i + 1}."} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataSpec(source=str(path))


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return open_model(str(tiny_llama(tmp_path / "model", initializer_range=0.2)))


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return str(tiny_llama(tmp_path / "teacher", seed=7, initializer_range=0.2))


def test_a_recipe_keeps_its_policy() -> None:
    recipe = Recipe(model="m", stages=(Distill(on_policy=POLICY),))
    plain = json.loads(json.dumps(recipe.to_json()))
    assert plain["stages"][0]["distill"]["on_policy"] == POLICY
    assert recipe_from(plain, {}) == recipe
    assert hash(recipe.stages[0]) == hash(Distill(on_policy=POLICY))
    assert recipe_from({"model": "m", "stages": [{"distill": {"on_policy": {}}}]}, {}) == (
        recipe_from(Recipe(model="m", stages=(Distill(on_policy={}),)).to_json(), {})
    )
    with pytest.raises(RecipeError, match="on_policy: expected a mapping or null"):
        recipe_from({"model": "m", "stages": [{"distill": {"on_policy": 0.5}}]}, {})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"on_policy": {"fraction": 0}}, ["fraction: expected a number above 0 and at most 1"]),
        ({"on_policy": {"fraction": 1.5, "top_p": 0.0}}, ["fraction: expected", "top_p: expected"]),
        ({"on_policy": {"lambda": 0.5}}, ["a field of OnPolicy"]),
        ({"on_policy": {**POLICY, "method": "gkd"}}, ["no key method"]),
        ({"on_policy": {"max_new_tokens": 20}}, ["at most 24 tokens, a row, for prompt and response"]),
        ({"context_length": None, "on_policy": {"max_new_tokens": 120}}, ["at most 128 tokens"]),
        ({"on_policy": {"max_new_tokens": 4, "prompt_fraction": 1.0}}, ["at most 24 tokens"]),
        ({"cross_entropy_weight": 0.5}, ["a teacher's loss alone"]),
        ({"loss": "cross_entropy", "features": "squarehead"}, ["a teacher's loss alone"]),
    ],
)
def test_what_cannot_be_is_told_together(
    changes: dict[str, Any], parts: list[str], source: Any, teacher: str, text: DataSpec
) -> None:
    assert told(Distill(teacher=teacher, on_policy=POLICY, **FEW), source, text) == []
    faults = told(Distill(**{"teacher": teacher, "on_policy": POLICY} | FEW | changes), source, text)
    assert len(faults) == len(parts)
    assert all(part in fault for part, fault in zip(parts, faults, strict=True)), faults


@pytest.mark.parametrize("placement", ["cache", "server"])
def test_what_is_kept_of_a_teacher_cannot_score_new_text(
    placement: str, source: Any, teacher: str, text: DataSpec
) -> None:
    faults = told(Distill(teacher=teacher, teacher_placement=placement, on_policy=POLICY), source, text)
    assert any("text that is not written yet has no scores" in fault for fault in faults)
    faults = told(Distill(teacher=teacher, teacher_placement=placement, alignment="spans"), source, text)
    assert any("an alignment asks it about its own tokens" in fault for fault in faults)


def test_a_model_that_cannot_go_on_from_a_text_is_refused(text: DataSpec, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    faults = told(Distill(on_policy=POLICY), open_model(str(tmp_path / "bert")), text)
    assert any("a model that goes on from a prompt, got BertConfig" in fault for fault in faults)


@pytest.mark.parametrize("kind", ["text", "dialogues"])
def test_a_student_learns_on_policy(
    kind: str, source: Any, teacher: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data: DataSpec = request.getfixturevalue(kind)
    stage = Distill(teacher=teacher, loss={"method": "jsd", "beta": 0.9}, on_policy=POLICY, **FEW)
    result, _ = run(stage, source, data, tmp_path / "a")
    same, _ = run(stage, source, data, tmp_path / "b")
    other, _ = run(replace(stage, on_policy=None), source, data, tmp_path / "c")
    assert result == same
    assert result.metrics["final_loss"] != other.metrics["final_loss"]
    before, after = (result.metrics[f"validation_loss{end}"] for end in ("_before", ""))
    assert after < before  # type: ignore[operator]


def test_tokens_that_are_counted_are_those_that_were_read(
    source: Any, teacher: str, text: DataSpec, tmp_path: Path
) -> None:
    """Of a step on the data whole rows, of another one prompts of a quarter row and what was said."""
    stage = Distill(teacher=teacher, on_policy={**POLICY, "max_new_tokens": 3}, **FEW)
    run(stage, source, text, tmp_path / "a")
    ends = [0, *(r["tokens"] for r in LossLog(tmp_path / "a" / "scratch" / LOSSES).read() if "tokens" in r)]
    rows, policy = FEW["batch_size"], OnPolicy(fraction=0.5)
    for step, (before, after) in enumerate(pairwise(ends)):
        if policy.is_due(step, 0):
            assert rows * 2 <= after - before <= rows * 9
        else:
            assert after - before == rows * 24
    assert len(ends) == FEW["steps"] + 1


def test_ids_that_are_no_text_are_not_said(text: DataSpec, tmp_path: Path) -> None:
    """The student has more rows than text has ids, as padded vocabularies have, and its teacher has not."""
    made = open_model(str(tiny_llama(tmp_path / "padded", vocab_size=2048)))
    teacher = str(tiny_llama(tmp_path / "teacher", seed=7, initializer_range=0.2))
    stage = Distill(teacher=teacher, on_policy={**POLICY, "fraction": 1.0}, **FEW)
    result, _ = run(stage, made, text, tmp_path / "a")
    assert result.metrics["final_loss"] < result.metrics["first_loss"]  # type: ignore[operator]


def test_a_teacher_with_another_tokenizer_scores_the_students_own_text(
    source: Any, text: DataSpec, tmp_path: Path
) -> None:
    teacher = str(save_marked(tmp_path / "marked"))
    stage = Distill(teacher=teacher, alignment="spans", on_policy={**POLICY, "fraction": 1.0}, **FEW)
    result, _ = run(stage, source, text, tmp_path / "a")
    assert 0 < result.metrics["final_parts"]["aligned"] < 0.5  # type: ignore[index, call-overload, operator]
    (warning,) = (w for w in result.warnings if "was heard on" in w)
    assert "a teacher whose tokenizer is more like" in warning, "cross_entropy_weight would be refused"
