"""A stage whose teacher is a cache: what a plan refuses and foretells, and what training makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import outlook, story, tiny_llama

from compresskit.data.spec import DataSpec
from compresskit.distill.cache.foresee import read_in_words
from compresskit.distill.placements.cache import PASS_TOKENS
from compresskit.distill.stage import Distill
from compresskit.distill.teacher import Replica
from compresskit.modeling import ModelSource, open_model
from compresskit.quant.qat import Qat
from compresskit.sparse.train import SparseTrain
from compresskit.stage import StageContext, StageResult
from compresskit.training.fields import TrainingFields
from compresskit.training.watch import LossLog

FEW = {"steps": 8, "batch_size": 4, "context_length": 24, "learning_rate": 1e-2, "checkpoint_every": 0}


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    path = tmp_path / "text.jsonl"
    rows = (json.dumps({"text": story(i)}) for i in range(24))
    path.write_text("\n".join(rows))
    return DataSpec(source=str(path))


@pytest.fixture
def student(tmp_path: Path) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path / "student", seed=1, hidden_size=16, intermediate_size=32)))


def run(stage: Distill, source: ModelSource, text: DataSpec, place: Path, cache: Path) -> StageResult:
    out, scratch = place / "out", place / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    settings: dict[str, Any] = {"original": source.directory, "cache": cache, "device": "cpu", "data": text}
    return stage.run(source, StageContext(out=out, scratch=scratch, **settings))


def losses(place: Path) -> list[float]:
    return LossLog(place / "scratch" / "losses.jsonl").losses()


@pytest.mark.parametrize(
    ("placement", "tolerance"),
    [
        ({"keep": "hidden", "precision": "model"}, 1e-6),
        ({"keep": "hidden"}, 1e-3),
        ({"k": 258}, 1e-3),
    ],
)
def test_the_loss_curve_is_the_live_teachers(
    teacher: Path,
    student: ModelSource,
    text: DataSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placement: dict[str, Any],
    tolerance: float,
) -> None:
    """Into a second pass of the data, and on rows held out; once it is made no teacher is loaded."""
    stage = Distill(teacher=str(teacher), **FEW | {"steps": None, "epochs": 1.7, "temperature": 2.0})
    alone = run(stage, student, text, tmp_path / "live", tmp_path / "cache")
    kept = replace(stage, teacher_placement={"method": "cache", **placement})
    first = run(kept, student, text, tmp_path / "first", tmp_path / "cache")
    assert len(losses(tmp_path / "first")) > 12
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "live"), rel=tolerance)
    assert first.metrics["validation_loss"] == pytest.approx(alone.metrics["validation_loss"], rel=tolerance)
    for part in ("forward_kl", "agreement"):
        true = alone.metrics["final_parts"][part]
        assert first.metrics["final_parts"][part] == pytest.approx(true, rel=tolerance, abs=0.01)
    assert "teacher" not in alone.metrics
    assert first.metrics["teacher"]["kl"] < 1e-4
    assert "nats a token from the teacher itself" in first.warnings[0]
    json.dumps(dict(first.metrics))
    monkeypatch.setattr(Replica, "_model", property(lambda self: pytest.fail("a teacher was loaded")))
    again = run(kept, student, text, tmp_path / "again", tmp_path / "cache")
    assert (again.metrics, again.warnings) == (first.metrics, first.warnings)
    assert losses(tmp_path / "again") == losses(tmp_path / "first")


def test_of_several_sources_every_row_is_asked_for(
    teacher: Path, student: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """An epoch of given shares leaves rows out, which a later one trains on."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"{i} and {i} make {i + i}."}) for i in range(60)))
    data = DataSpec(source=f"{text.source}=0.9,{other}=0.1")
    stage = Distill(teacher=str(teacher), teacher_placement="cache", **FEW | {"steps": None, "epochs": 2.5})
    made = run(stage, student, data, tmp_path / "mixed", tmp_path / "cache").metrics
    assert made["final_loss"] < made["first_loss"]
    noted = stage.forecast(outlook(student, data=data)).notes[-2]
    megabytes = float(noted.split("about ")[1].split(" MB")[0])
    assert megabytes == pytest.approx(made["teacher"]["bytes"] / 1e6, rel=0.25)


@pytest.mark.parametrize("placement", [{"k": 8}, {"keep": "sampled", "k": 20}])
def test_few_ids_teach_too(
    teacher: Path, student: ModelSource, text: DataSpec, tmp_path: Path, placement: dict[str, Any]
) -> None:
    """The rest is one outcome, so the loss starts below the whole teacher's; draws are spikes, so above."""
    stage = Distill(teacher=str(teacher), **FEW | {"steps": 30})
    cached = replace(stage, teacher_placement={"method": "cache", **placement})
    result = run(cached, student, text, tmp_path / "cached", tmp_path / "cache")
    assert result.metrics["final_loss"] < 0.95 * result.metrics["first_loss"]
    whole = run(replace(stage, steps=1), student, text, tmp_path / "live", tmp_path / "cache")
    above = result.metrics["first_loss"] > whole.metrics["first_loss"]
    assert above == ("keep" in placement)


def faults(stage: Distill, student: ModelSource) -> list[tuple[str, str, str]]:
    where = "s.teacher_placement"
    found = stage.faults(outlook(student), "s")
    assert all(fault.where.startswith(where) for fault in found), found
    return [(fault.where.removeprefix(where), fault.got, fault.cure) for fault in found]


@pytest.mark.parametrize(
    ("placement", "changes", "where", "got", "cure"),
    [
        ({"keep": "most"}, {}, ".keep", "'most'", "Choose one of these."),
        ({"keep": "hidden", "precision": "fp8"}, {}, ".precision", "'fp8'", "Choose one of these."),
        ({"k": 0}, {}, ".k", "0", "Leave k out, which is 64, or choose one at least 1 and at most 65535."),
        ({"k": 300}, {}, ".k", "300, of 258 ids", "Lower k."),
        ({"keep": "hidden", "k": 8}, {}, ".k", "8", "Leave it out."),
        ({"precision": "model"}, {}, ".precision", "model", "Leave it out."),
        ({}, {"features": "squarehead"}, "", "features", "Leave features out"),
        ({}, {"loss": {"method": "jsd", "top_k": 8}}, ".k", "64", "Set k: 8, or leave top_k out"),
        (
            {"keep": "sampled"},
            {"loss": "reverse_kl"},
            ".keep",
            "reverse_kl, which draws would give another gradient even on average",
            "Use loss: forward_kl without top_k, or keep: top_k or hidden.",
        ),
        (
            {"keep": "sampled"},
            {"loss": {"method": "forward_kl", "top_k": 8}},
            ".keep",
            "forward_kl of the 8 likeliest ids",
            "Use loss: forward_kl without top_k",
        ),
        ({"dir": "FILE"}, {}, ".dir", "the file ", "Name another one."),
        ({"ids": 5}, {}, ".ids", "'ids'", "Did you mean"),
    ],
)
def test_what_a_cache_cannot_do_is_refused_by_the_plan(
    student: ModelSource,
    tmp_path: Path,
    placement: dict[str, Any],
    changes: dict[str, Any],
    where: str,
    got: str,
    cure: str,
) -> None:
    (tmp_path / "file").write_text("")
    given = {name: str(tmp_path / "file") if value == "FILE" else value for name, value in placement.items()}
    stage = Distill(teacher_placement={"method": "cache", **given}, **FEW | changes)
    ((found_where, found_got, found_cure),) = faults(stage, student)
    assert found_where == where
    assert got in found_got
    assert cure in found_cure


@pytest.mark.parametrize(
    ("placement", "changes"),
    [
        ({"k": 8}, {"loss": {"method": "jsd", "top_k": 8}}),
        ({"keep": "hidden"}, {"loss": ["reverse_kl", {"method": "jsd", "top_k": 8}]}),
        ({"keep": "sampled", "k": 5}, {"cross_entropy_weight": 0.5}),
    ],
)
def test_what_it_can_do_has_no_fault(
    student: ModelSource, placement: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert faults(Distill(teacher_placement={"method": "cache", **placement}, **FEW | changes), student) == []


def test_a_plan_tells_the_size_and_needs_no_teacher_while_training(
    student: ModelSource, teacher: Path, text: DataSpec, tmp_path: Path
) -> None:
    held = outlook(student, data=text, original=teacher)
    many = {"batch_size": 4096}  # so that training takes more than the pass that makes the cache
    live = Distill(**FEW | many).forecast(held).memory_bytes
    for placement, each, kept in (
        ({"k": 8}, 8 * (2 + 2) + 2, 0),
        ({"keep": "hidden"}, 32 * 2, 258 * 32 * 4),
        ({"keep": "sampled", "k": 20}, 2 + 20 * (2 + 1), 0),
    ):
        stage = Distill(teacher_placement={"method": "cache", **placement}, **FEW)
        found = stage.forecast(held)
        assert f"{each:,} bytes on disk for each supervised token" in found.notes[-2]
        made = run(
            replace(stage, teacher=str(teacher)), student, text, tmp_path / str(each), tmp_path / "cache"
        )
        told = made.metrics["teacher"]
        megabytes = float(found.notes[-2].split("about ")[1].split(" MB")[0])
        assert megabytes == pytest.approx(told["tokens"] * each / 1e6, abs=0.15)
        trained = replace(stage, **many).forecast(held).memory_bytes
        assert trained == live - open_model(str(teacher)).bytes + kept
    qat = Qat(loss="forward_kl", teacher_placement="cache", scheme="w8a8", **FEW)
    assert "for each supervised token" in " ".join(qat.forecast(held).notes)


def test_a_plan_has_room_for_the_pass_that_makes_the_cache(
    student: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """One process has the whole teacher then, however little of it is there while the student trains."""
    kinds: dict[str, Any] = {"hidden_size": 64, "tie_word_embeddings": False, "dtype": torch.bfloat16}
    teachers = [
        open_model(str(tiny_llama(tmp_path / f"deep-{blocks}", num_hidden_layers=blocks, **kinds)))
        for blocks in (40, 80)
    ]
    more = teachers[1].bytes - teachers[0].bytes
    assert more > 1_000_000
    held = outlook(student, data=text)
    for stage in (
        Distill(**FEW),
        Qat(loss="forward_kl", scheme="w8a8", **FEW),
        SparseTrain(method="gradual", loss="forward_kl", pattern="2:4", **FEW),
    ):
        live = stage.forecast(held).memory_bytes
        for keep, models in (("top_k", 1), ("hidden", 2)):
            cached = [
                replace(
                    stage, teacher=str(one.directory), teacher_placement={"method": "cache", "keep": keep}
                )
                for one in teachers
            ]
            one, two = (other.forecast(held).memory_bytes for other in cached)
            assert two - one == more, "what is left is the same pass of the same width"
            tokens = PASS_TOKENS
            logits = models * tokens * 258 * 4
            blocks = tokens * (64 + 64 + 64) * 2
            assert one > teachers[0].bytes + logits + blocks
            assert one > live


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_plan_tells_how_many_rows_are_made_and_read(
    batch_size: int, student: ModelSource, teacher: Path, text: DataSpec, tmp_path: Path
) -> None:
    few = FEW | {"steps": 4, "batch_size": batch_size}
    stage = Distill(teacher=str(teacher), teacher_placement="cache", **few)
    noted = stage.forecast(outlook(student, data=text)).notes[-1]
    made = run(stage, student, text, tmp_path, tmp_path / "cache").metrics["teacher"]
    rows = int(noted.split("about ")[1].split(" ")[0].replace(",", ""))
    assert rows == pytest.approx(made["rows"], abs=2)
    assert f" of {few['context_length']} tokens" in noted
    assert ("it serves longer runs" in noted) == (batch_size != 32), noted
    assert ("the steps read 8: " in noted) == (batch_size == 2)


def test_epochs_read_whole_batches() -> None:
    told = read_in_words((1000, True), 100, TrainingFields(epochs=0.5, batch_size=4))
    assert "about 10 of 100 tokens, of which the steps read 8: " in told
