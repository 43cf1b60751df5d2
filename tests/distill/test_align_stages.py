"""Alignments in recipes: what they refuse, what they learn, what they tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from marked import save_marked
from test_stages import FEW, outlook, run
from tiny import tiny_llama
from transformers import BertTokenizerFast

from compresskit.data.spec import DataSpec
from compresskit.distill.align import ALIGNMENTS
from compresskit.distill.finetune import Finetune
from compresskit.distill.stage import Distill
from compresskit.modeling import load_tokenizer, open_model
from compresskit.options import Choice
from compresskit.quant.qat import Qat
from compresskit.recipe import Recipe, recipe_from


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"and and cab and can and band {i % 10}" for i in range(300)))
    return DataSpec(source=str(path))


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return str(save_marked(tmp_path / "teacher"))


@pytest.fixture
def student(tmp_path: Path) -> Any:
    return open_model(str(tiny_llama(tmp_path / "student")))


def told(stage: Any, source: Any, text: DataSpec) -> list[str]:
    return [str(fault) for fault in stage.faults(outlook(source, data=text), "stages[0]")]


def test_without_an_alignment_the_three_ways_out_are_told(student: Any, teacher: str, text: DataSpec) -> None:
    (fault,) = told(Distill(teacher=teacher), student, text)
    for way in ("the student's tokenizer", "build the student anew", "alignment: spans", "alignment: uld"):
        assert way in fault


@pytest.mark.parametrize("stage", [Distill, Qat])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_an_alignment_is_planned_and_every_stage_that_is_taught_has_it(
    stage: Any, name: str, student: Any, teacher: str, text: DataSpec
) -> None:
    loss = "uld" if name == "uld" else "jsd"
    made = stage(teacher=teacher, loss=loss, alignment=name)
    assert made.alignment == Choice(name)
    assert told(made, student, text) == []
    recipe = Recipe(model="m", stages=(made,))
    assert recipe_from(json.loads(json.dumps(recipe.to_json())), {}) == recipe


def test_what_does_not_go_together_is_told_at_once(student: Any, teacher: str, text: DataSpec) -> None:
    losses = ("forward_kl", {"method": "jsd", "top_k": 3}, "uld")
    faults = told(
        Distill(teacher=teacher, loss=losses, alignment={"method": "spans", "top": 0}, features="squarehead"),
        student,
        text,
    )
    for part in ("alignment.top: expected a number at least 1", "beside features", "top_k of jsd"):
        assert sum(part in fault for fault in faults) == 1, part
    assert sum("that alignment spans serves, got uld" in fault for fault in faults) == 1
    assert len([f for f in faults if "stages[0].features.layers" not in f]) == 4
    (fault,) = told(Distill(teacher=teacher, alignment="uld"), student, text)
    assert "one of these losses: uld" in fault
    (fault,) = told(Distill(teacher=teacher, alignment="span"), student, text)
    assert "Did you mean: spans" in fault
    (fault,) = told(Distill(alignment={"method": "none", "top": 3}), student, text)
    assert "no fields beside alignment: none" in fault
    (fault,) = told(Qat(alignment="spans"), student, text)
    assert "beside loss: cross_entropy" in fault


def test_tokens_that_are_no_pieces_of_text_are_refused(
    student: Any, teacher: str, text: DataSpec, tmp_path: Path
) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "and", "##d"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(teacher) / name).unlink()
    BertTokenizerFast(vocab=str(vocab)).save_pretrained(teacher)
    (fault,) = told(Distill(teacher=teacher, alignment="spans"), student, text)
    assert "byte-level or sentencepiece tokenizer of the teacher" in fault


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(
    side: str, student: Any, teacher: str, text: DataSpec
) -> None:
    place = Path(teacher) if side == "teacher" else student.directory
    tokenizer = load_tokenizer(place)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(9)])
    tokenizer.save_pretrained(place)
    (fault,) = told(Distill(teacher=teacher, alignment="spans"), student, text)
    assert f"an output projection of the {side} for each of {len(tokenizer)} token ids" in fault


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_a_student_learns_from_a_teacher_with_another_tokenizer(
    name: str, student: Any, teacher: str, text: DataSpec, tmp_path: Path
) -> None:
    loss = "uld" if name == "uld" else "forward_kl"
    stage = Distill(teacher=teacher, loss=loss, alignment=name, **FEW | {"steps": 20})
    result, _ = run(stage, student, text, tmp_path / "a")
    parts: Any = result.metrics["final_parts"]
    assert 0.1 < parts["aligned"] < (0.5 if name == "spans" else 0.7)
    assert ("agreement" in parts) == (name == "spans")
    assert result.metrics["final_loss"] < 0.8 * result.metrics["first_loss"]  # type: ignore[operator]
    assert len(result.warnings) == (parts["aligned"] < 0.5)
    assert all(f"heard on {parts['aligned']:.0%} of the tokens" in warning for warning in result.warnings)
    mixed, _ = run(replace(stage, cross_entropy_weight=0.5), student, text, tmp_path / "b")
    assert set(mixed.metrics["final_parts"]) == set(parts) | {"cross_entropy"}  # type: ignore[call-overload]


def test_the_same_tokenizer_on_both_sides_may_be_aligned_too(
    student: Any, text: DataSpec, tmp_path: Path
) -> None:
    teacher = tiny_llama(tmp_path / "other", seed=5, initializer_range=0.3)
    stage = Distill(teacher=str(teacher), alignment={"method": "spans", "top": 258}, **FEW)
    result, _ = run(stage, student, text, tmp_path / "a")
    plain, _ = run(replace(stage, alignment="none"), student, text, tmp_path / "b")
    assert result.warnings == ()
    assert result.metrics["final_parts"]["aligned"] > 0.9  # type: ignore[index, call-overload, operator]
    assert result.metrics["final_loss"] == pytest.approx(plain.metrics["final_loss"], rel=0.1)


def test_a_stage_without_a_teacher_has_no_alignment() -> None:
    with pytest.raises(TypeError):
        Finetune(alignment="spans")  # type: ignore[call-arg]


def test_a_teacher_in_few_bits_says_how_far_it_is_through_an_alignment_too(
    student: Any, teacher: str, text: DataSpec, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    stage = Distill(teacher=teacher, teacher_placement="4bit", alignment="spans", **FEW)
    result, _ = run(stage, student, text, tmp_path / "a")
    assert sum(warning.startswith("The teacher in 4 bits is ") for warning in result.warnings) == 1
