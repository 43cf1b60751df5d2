"""Features in a recipe: what is refused, all at once; what is forecast; stages that learn them end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, outlook, stories, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from compresskit.cli.common import one_stage_recipe
from compresskit.cli.distill import distill as command
from compresskit.data.spec import DataSpec
from compresskit.distill.features import WithFeatures
from compresskit.distill.finetune import Finetune
from compresskit.distill.lesson import TeachersLesson, feature_bytes
from compresskit.distill.stage import Distill
from compresskit.errors import PlanError, RecipeError
from compresskit.modeling import ModelSource, open_model
from compresskit.planned import summary
from compresskit.quant.qat import Qat
from compresskit.recipe import Recipe, load_recipe, recipe_from
from compresskit.schema import recipe_schema
from compresskit.sparse.train import SparseTrain
from compresskit.stage import StageContext, StageResult
from compresskit.training.job import TrainJob
from compresskit.training.watch import LossLog

FEW: dict[str, Any] = {"steps": 6, "batch_size": 4, "context_length": 24, "learning_rate": 1e-2}
FEW |= {"checkpoint_every": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(stories())
    return DataSpec(source=str(path))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("teacher")
    return open_model(str(tiny_llama(place / "m", seed=1, num_hidden_layers=4, initializer_range=0.2)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path_factory.mktemp("student") / "m", initializer_range=0.2)))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("narrow")
    return open_model(str(tiny_llama(place / "m", hidden_size=16, intermediate_size=32)))


def run(stage: Any, source: ModelSource, text: DataSpec, place: Path) -> tuple[StageResult, Path]:
    out, scratch = place / "out", place / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    context = StageContext(
        out=out,
        scratch=scratch,
        data=text,
        original=source.directory,
        cache=place / "cache",
        device="cpu",
    )
    return stage.run(source, context), out


def faults(stage: Any, source: ModelSource) -> list[str]:
    return [str(fault) for fault in stage.faults(outlook(source), "s")]


def test_faults_of_all_kinds_come_together(source: ModelSource, teacher: ModelSource) -> None:
    wrong = {"method": "squarehed", "weight": 0, "layers": {0: 4, 2: 1}}
    found = faults(Distill(teacher=str(teacher.directory), temperature=0.0, features=wrong), source)
    assert [fault.split(":")[0] for fault in found] == [
        "s.temperature",
        "s.features",
        "s.features.weight",
        "s.features.layers",
        "s.features.layers",
    ]
    assert "Did you mean: squarehead?" in found[1]
    assert "blocks of the student from 0 to 1, got 2" in found[3]
    assert "blocks of the teacher from 0 to 3, got 4" in found[4]


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ({"weight": 1.0}, "expected the key method"),
        ({"method": "hidden_mse", "wieght": 1.0}, "Did you mean: weight?"),
        ({"method": "hidden_mse", "weight": float("nan")}, "expected a number above 0"),
        ({"method": "hidden_mse", "weight": "much"}, "expected a number"),
        ({"method": "hidden_cosine", "layers": "first"}, "expected uniform, last_1"),
        ({"method": "hidden_cosine", "layers": "last_3"}, "from 1 to 2: the student has 2 blocks, the teach"),
        ({"method": "hidden_cosine", "layers": [[0]]}, "expected uniform"),
        ({"method": "hidden_cosine", "layers": {"a": 1, 0: 1}}, "expected uniform"),
    ],
)
def test_what_is_wrong_is_told(
    source: ModelSource, teacher: ModelSource, features: dict[str, Any], told: str
) -> None:
    (found,) = faults(Distill(teacher=str(teacher.directory), features=features), source)
    assert found.startswith("s.features")
    assert told in found


def test_of_several_each_is_told_at_its_place(source: ModelSource, teacher: ModelSource) -> None:
    wrong = [
        {"method": "squarehed"},
        {"method": "relation", "of": ["qk"], "relation_heads": 5},
        {"method": "hidden_mse", "weight": 0, "layers": "last_3"},
    ]
    name = str(teacher.directory)
    found = faults(Distill(teacher=name, features=wrong), source)
    assert [fault.split(": ")[0] for fault in found] == [
        "s.features[0]",
        "s.features[2].weight",
        "s.features[2].layers",
    ]
    placed = Distill(teacher=name, features=["squarehead", wrong[1]], teacher_placement="4bit")
    found = faults(placed, source)
    assert [fault.split(": ")[0] for fault in found] == [
        "s.features[1]",
        "s.features[1].of",
        "s.features[1].relation_heads",
        "s.features[1].relation_heads",
    ]
    assert "teacher_placement replicate beside relation, got 4bit" in found[0]
    (told,) = faults(Distill(teacher=name, features=[]), source)
    assert told.startswith("s.features: expected at least one feature loss, got an empty list")
    assert faults(Distill(teacher=name, features=["squarehead", "relation", "hidden_mse"]), source) == []


def test_text_alone_with_features_needs_a_teacher_that_is_named(
    source: ModelSource, teacher: ModelSource
) -> None:
    """A stage that may do without a teacher is asked; `distill` always has one."""
    for stage in (SparseTrain, Qat):
        (found,) = faults(stage(features="squarehead"), source)
        assert found.startswith("s.teacher: expected a teacher for features, got none")
        assert faults(stage(features="squarehead", teacher=str(teacher.directory)), source) == []
        assert faults(stage(features="squarehead", loss="forward_kl"), source) == []
    assert faults(Distill(features="squarehead", loss="cross_entropy"), source) == []
    (found,) = faults(Distill(features="squarehead", loss="cross_entropy", temperature=2.0), source)
    assert found.startswith("s.temperature: expected nothing beside loss: cross_entropy")
    (found,) = faults(Distill(loss="cross_entropy"), source)
    assert found.startswith("s.loss: expected the name of a distillation loss")


def test_a_model_without_blocks_is_refused(source: ModelSource, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=0, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "none")
    byte_tokenizer().save_pretrained(tmp_path / "none")
    bare = open_model(str(tmp_path / "none"))
    (found,) = faults(Distill(teacher=str(bare.directory), features="hidden_mse"), source)
    assert "a model of repeated blocks whose configuration has a hidden_size, as teacher" in found
    assert "Leave features out" in found


def test_a_teacher_that_is_not_there_is_told_once(source: ModelSource, tmp_path: Path) -> None:
    (found,) = faults(Distill(teacher=str(tmp_path / "no"), features="hidden_mse"), source)
    assert found.startswith("s.teacher")


FORMS = [
    "squarehead",
    {"method": "squarehead", "weight": 0.5, "layers": "last_1"},
    {"method": "hidden_mse", "layers": {1: 3, 0: 1}},
    [
        "squarehead",
        {"method": "relation", "weight": 0.5, "of": ["vv"]},
        {"method": "squarehead", "weight": 2.0},
    ],
    ["hidden_mse"],
]


@pytest.mark.parametrize("features", FORMS, ids=str)
def test_a_recipe_is_read_back_equal(features: Any, tmp_path: Path) -> None:
    """As Python wrote it, as JSON and as YAML; equal stages are equal however they were written."""
    recipe = Recipe(model="m", stages=(Distill(features=features), Qat(features=features)))
    assert recipe_from(json.loads(json.dumps(recipe.to_json())), {}) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    jsonschema.Draft202012Validator(recipe_schema()).validate(recipe.to_json())
    assert len({*recipe.stages, *again.stages}) == 2
    if isinstance(features, dict) and isinstance(features.get("layers"), dict):
        pairs = {**features, "layers": [[0, 1], [1, 3]]}
        assert Distill(features=pairs) == recipe.stages[0]


def test_the_command_line_takes_several() -> None:
    (option,) = [o for o in command.params if o.name == "features"]
    typed = ["squarehead", "{method: relation, weight: 0.5}"]
    given = option.type_cast_value(click.Context(command), typed)
    recipe = one_stage_recipe("distill", Distill, "m", {"features": given})
    assert recipe.stages == (Distill(features=["squarehead", {"method": "relation", "weight": 0.5}]),)
    one = one_stage_recipe("distill", Distill, "m", {"features": ("squarehead",)})
    assert one.stages == (Distill(features="squarehead"),)


def test_what_is_no_features_at_all_is_told() -> None:
    with pytest.raises(
        RecipeError, match="features: expected text or a mapping or a list of text or a mapping or null"
    ):
        recipe_from({"model": "m", "stages": [{"distill": {"features": 3}}]}, {})


def test_the_forecast_counts_what_is_kept(
    source: ModelSource, narrow: ModelSource, teacher: ModelSource
) -> None:
    """Two states of a float a number for each compared block; projections with their moments."""
    stage = Distill(teacher=str(teacher.directory), features="squarehead", **FEW)
    tokens = 4 * 24
    assert feature_bytes(stage, outlook(source)) == 2 * 2 * tokens * 32 * 4
    plain = replace(stage, features=None)
    more = stage.forecast(outlook(source)).memory_bytes - plain.forecast(outlook(source)).memory_bytes
    assert more == feature_bytes(stage, outlook(source))
    half = replace(stage, micro_batch_size=2, features={"method": "squarehead", "layers": "last_1"})
    assert feature_bytes(half, outlook(source)) == feature_bytes(stage, outlook(source)) / 4
    assert feature_bytes(stage, outlook(narrow)) == 2 * (tokens * (16 + 32 + 32) * 4 + 16 * 32 * 16)
    few = {"method": "hidden_cosine", "layers": {0: 3}}
    several = replace(stage, features=["squarehead", "hidden_mse", few, "relation"])
    alone = replace(stage, features="relation")
    shared = feature_bytes(several, outlook(source)) - feature_bytes(alone, outlook(source))
    assert shared == feature_bytes(stage, outlook(source))
    shared = feature_bytes(several, outlook(narrow)) - feature_bytes(alone, outlook(narrow))
    one_more = tokens * 32 * 4 + 16 * 32 * 16  # a pair of blocks of their own, with a projection
    assert shared == feature_bytes(stage, outlook(narrow)) + one_more
    for other in (SparseTrain, Qat):
        taught = other(teacher=str(teacher.directory), features="squarehead", **FEW)
        alone = other(**FEW)
        more = taught.forecast(outlook(source)).memory_bytes - alone.forecast(outlook(source)).memory_bytes
        assert more == teacher.bytes + feature_bytes(stage, outlook(source))


@pytest.mark.parametrize("method", ["squarehead", "hidden_mse", "hidden_cosine"])
@pytest.mark.parametrize("student", ["source", "narrow"])
def test_distil_with_features_writes_a_plain_model(
    request: pytest.FixtureRequest,
    teacher: ModelSource,
    text: DataSpec,
    tmp_path: Path,
    method: str,
    student: str,
) -> None:
    source = request.getfixturevalue(student)
    stage = Distill(teacher=str(teacher.directory), features=method, **FEW)
    assert faults(stage, source) == []
    result, out = run(stage, source, text, tmp_path / "stage")
    made = load_file(out / "model.safetensors")
    assert set(made) == set(source.names())
    assert all(torch.isfinite(t).all() for t in made.values())
    assert set(result.metrics["final_parts"]) == {"forward_kl", "agreement", method}
    log = LossLog(tmp_path / "stage" / "scratch" / "losses.jsonl").read()
    features = [record["parts"][method] for record in log if "parts" in record]
    assert len(features) == 6
    assert features[-1] < features[0]


def test_distil_with_several_features(
    narrow: ModelSource, teacher: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    features = ["squarehead", {"method": "relation", "weight": 2.0}, "hidden_cosine"]
    stage = Distill(teacher=str(teacher.directory), features=features, **FEW)
    assert faults(stage, narrow) == []
    result, out = run(stage, narrow, text, tmp_path / "stage")
    assert set(load_file(out / "model.safetensors")) == set(narrow.names())
    names = {"forward_kl", "agreement", "squarehead", "relation", "hidden_cosine"}
    assert set(result.metrics["final_parts"]) == names
    log = LossLog(tmp_path / "stage" / "scratch" / "losses.jsonl").read()
    first = next(record for record in log if "parts" in record)
    said = first["parts"]
    summed = said["forward_kl"] + said["squarehead"] + 2 * said["relation"] + said["hidden_cosine"]
    assert first["loss"] == pytest.approx(summed, rel=1e-5)
    assert summary(stage).startswith("forward_kl squarehead + relation + hidden_cosine")


def test_parts_pair_blocks_as_the_recipe_says(
    source: ModelSource, narrow: ModelSource, teacher: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    context = StageContext(
        out=tmp_path, scratch=tmp_path, data=text, original=teacher.directory, cache=tmp_path, device="cpu"
    )
    features = {"method": "hidden_mse", "weight": 2.0, "layers": {0: 3, 1: 0}}
    for student, widths in ((source, None), (narrow, (16, 32))):
        objective, signal = TeachersLesson.parts(Distill(features=features), student, context)
        job = TrainJob(
            model="m",
            out="o",
            scratch="s",
            fields={},
            objective=objective,
            teacher=signal,
            data={"source": "x"},
            context_length=8,
            cache="c",
        )
        for part in (objective, TrainJob.from_json(job.to_json()).objective):
            made = part.make()
            assert isinstance(made, WithFeatures)
            (one,) = made.features
            assert (made.looks.outputs, one.pairs, made.widths) == ((0, 1), ((0, 3), (1, 0)), widths)
            assert one.loss.weight == 2.0
        assert signal.options["blocks"] == (0, 3)
    stage = Distill(features={"method": "hidden_mse", "layers": "last_3"})
    with pytest.raises(PlanError, match="from 1 to 2"):
        TeachersLesson.parts(stage, source, context)


@pytest.mark.parametrize(
    "stage",
    [
        SparseTrain(pattern="50%", method="gradual"),
        SparseTrain(pattern="2:4", method="srste"),
        Qat(scheme="w8a8"),
        Qat(scheme="w8a8-static", observer_steps=2),
    ],
    ids=["gradual", "srste", "qat", "static"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stages_that_swap_layers_or_make_zeros_learn_features_too(
    source: ModelSource, teacher: ModelSource, text: DataSpec, tmp_path: Path, stage: Any, checkpointing: bool
) -> None:
    stage = replace(
        stage,
        teacher=str(teacher.directory),
        features={"method": "squarehead", "weight": 0.5},
        activation_checkpointing=checkpointing,
        **FEW,
    )
    assert faults(stage, source) == []
    result, out = run(stage, source, text, tmp_path / "stage")
    assert set(result.metrics["final_parts"]) == {"squarehead"}
    assert set(source.names()) <= set(load_file(out / "model.safetensors"))
    log = LossLog(tmp_path / "stage" / "scratch" / "losses.jsonl").read()
    first = log[0]
    assert first["loss"] > first["parts"]["squarehead"] * 0.5 > 0
    if checkpointing:
        again = replace(stage, activation_checkpointing=False)
        run(again, source, text, tmp_path / "plain")
        plain = LossLog(tmp_path / "plain" / "scratch" / "losses.jsonl").losses()
        assert [r["loss"] for r in log if "loss" in r] == pytest.approx(plain, rel=1e-4)


def test_finetune_has_no_features() -> None:
    assert not hasattr(Finetune(), "features")


def test_heads_that_are_split_cannot_be_compared(source: ModelSource, teacher: ModelSource) -> None:
    split = {"processes": 2, "strategy": "tp", "tensor_parallel": 2, "teacher": str(teacher.directory)}
    assert faults(Distill(features="hidden_mse", **split), source) == []
    (told,) = faults(Distill(features="relation", **split), source)
    assert told.startswith("s.features: expected attention whose heads are all in each process, got tensor_")
    (told,) = faults(Distill(features="hidden_mse", **split | {"processes": 4, "tensor_parallel": 4}), source)
    assert "a divisor of num_key_value_heads=2, got 4" in told
