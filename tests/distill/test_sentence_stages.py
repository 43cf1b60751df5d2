"""Losses on sentences in a recipe: what is refused, all at once; what is forecast; chains end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, T5Config, T5Model

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.distill.finetune import Finetune
from compresskit.distill.stage import Distill
from compresskit.errors import DataError
from compresskit.modeling import ModelSource, open_model
from compresskit.recipe import load_recipe, recipe_from
from compresskit.stage import Outlook

FEW: dict[str, Any] = {"steps": 8, "batch_size": 4, "context_length": 12, "learning_rate": 1e-2}
FEW |= {"checkpoint_every": 0}
RELATION = {"method": "relation", "weight": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders, classifiers of 3 and of 2 classes, a language model, and sentences with a class."""
    out = tmp_path_factory.mktemp("models")
    tiny_bert(out / "teacher", seed=1, num_hidden_layers=4)
    tiny_bert(out / "narrow", hidden_size=24, num_attention_heads=3)
    tiny_bert(out / "three", seed=1, classes=3, initializer_range=0.5)
    tiny_bert(out / "other-three", classes=3)
    tiny_bert(out / "two", classes=2)
    tiny_bert(out / "several", classes=3, problem_type="multi_label_classification")
    tiny_llama(out / "llama", initializer_range=0.2)
    lines = ["label\tsentence"]
    lines += [f"{i % 3}\tw{4 + i % 60} w{4 + i * i % 60} w{4 + 7 * i % 60}" for i in range(160)]
    (out / "sentences.tsv").write_text("\n".join(lines) + "\n")
    return out


def opened(place: Path, name: str) -> ModelSource:
    return open_model(str(place / name))


def outlook(place: Path, name: str) -> Outlook:
    source = opened(place, name)
    return Outlook(
        anatomy=source.anatomy,
        config=source.config,
        tokenizer=source.directory,
        original=source.directory,
        weight_bytes=4.0,
        data=DataSpec(source=str(place / "sentences.tsv"), examples=True),
    )


def faults(place: Path, name: str, **fields: Any) -> list[str]:
    if teacher := fields.get("teacher"):
        fields["teacher"] = str(place / teacher)
    return [str(fault) for fault in Distill(**fields).faults(outlook(place, name), "s")]


@pytest.mark.parametrize(
    ("student", "fields"),
    [
        ("narrow", {"teacher": "teacher", "loss": ["embedding_cosine", "pairwise"], "features": RELATION}),
        ("narrow", {"teacher": "teacher", "loss": {"method": "embedding_mse", "pooling": "cls"}}),
        ("narrow", {"loss": "embedding_cosine", "features": "hidden_mse"}),
        ("other-three", {"teacher": "three", "loss": "class_logits", "temperature": 2.0}),
        ("three", {"teacher": "teacher", "loss": "embedding_cosine"}),
        ("llama", {"features": {"method": "relation", "of": ["kk"], "relation_heads": 2}}),
    ],
    ids=str,
)
def test_what_fits_has_no_fault(place: Path, student: str, fields: dict[str, Any]) -> None:
    assert faults(place, student, **fields) == []


@pytest.mark.parametrize(
    ("student", "fields", "told"),
    [
        ("narrow", {"teacher": "teacher"}, "s: expected a causal language model.*loss: embedding_cosine"),
        ("llama", {"loss": "embedding_cosine"}, "s.loss: .*reads sentences whole.*Choose a loss on next tok"),
        ("narrow", {"loss": "class_logits"}, "s: expected a classifier of sentences, got BertConfig"),
        (
            "two",
            {"teacher": "three", "loss": "class_logits"},
            "teacher's 3, got 2 in the student.*num_lab",
        ),
        ("several", {"loss": "class_logits"}, "problem_type single_label_classification, got multi_label"),
        ("narrow", {"loss": ["embedding_cosine", "forward_kl"]}, r"s.loss\[1\]: .*a loss on next tokens"),
        ("two", {"loss": ["embedding_mse", "class_logits"]}, "losses on embeddings, or losses on logits"),
        ("narrow", {"loss": {"method": "embedding_mse", "pooling": "max"}}, "mean or cls, got 'max'"),
        ("narrow", {"loss": {"method": "embedding_mse", "poling": "cls"}}, "Did you mean: pooling?"),
        ("narrow", {"loss": "pairwise", "batch_size": 1}, "at least 2 sentences in a forward pass, got 1"),
        ("narrow", {"loss": "embedding_mse", "temperature": 2.0}, "embeddings have no probabilities"),
        (
            "two",
            {"loss": "class_logits", "temperature": 0.0},
            "s.temperature: expected a finite number above 0",
        ),
        ("two", {"loss": "class_logits", "temperature": float("inf")}, "a finite number above 0, got inf"),
        ("two", {"loss": "class_logits", "cross_entropy_weight": 2.0}, "a number from 0 to 1, got 2.0"),
        ("narrow", {"loss": "embedding_mse", "teacher": "llama"}, "the same token ids"),
        ("narrow", {"loss": "embedding_mse", "teacher": "none"}, "s.teacher .*expected a model directory"),
    ],
)
def test_what_is_wrong_is_told(place: Path, student: str, fields: dict[str, Any], told: str) -> None:
    found = "\n".join(faults(place, student, **fields))
    with pytest.raises(ValueError, match=told):
        raise ValueError(found)


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ({"method": "relation", "of": ["qk"]}, "some of qq, kk, vv, got 'qk'"),
        ({"method": "relation", "of": []}, "some of qq, kk, vv, got none"),
        (
            {"method": "relation", "relation_heads": 5},
            "divides all widths, got 5 of widths 24 in the stud",
        ),
        ({"method": "relation", "relation_heads": 3}, "got 3 of widths 32 in the teacher"),
        ({"method": "relation", "layers": "last_3"}, "a number from 1 to 2"),
    ],
)
def test_relations_that_cannot_be_are_told(place: Path, features: dict[str, Any], told: str) -> None:
    found = faults(place, "narrow", teacher="teacher", loss="embedding_cosine", features=features)
    assert any(told in fault for fault in found), found


def test_a_model_that_needs_more_than_a_sentence_is_refused(place: Path, tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(place / "teacher").save_pretrained(tmp_path / "t5")
    found = faults(tmp_path, "t5", loss="embedding_mse")
    assert any("makes states of token ids and a mask, got T5Config" in fault for fault in found), found


def test_no_stage_but_distil_takes_an_encoder(place: Path) -> None:
    (found,) = Finetune().faults(outlook(place, "narrow"), "s")
    assert "class_logits for a classifier" in found.cure


def test_data_without_sentences_is_told(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_text("label\tsentence\n")
    data = DataSpec(source=str(tmp_path / "empty.tsv"))
    found = [str(f) for f in Distill(loss="embedding_mse", data=data).faults(outlook(place, "narrow"), "s")]
    assert any(fault.startswith("s.data") for fault in found), found


def test_a_recipe_is_read_back_equal(tmp_path: Path) -> None:
    loss = ["embedding_cosine", {"method": "pairwise", "weight": 2.0, "pooling": "cls"}]
    features = {"method": "relation", "of": ["vv"], "relation_heads": 4, "layers": {1: 2}}
    recipe = ck.Recipe(model="m", stages=(Distill(loss=loss, features=features),))
    assert recipe_from(json.loads(json.dumps(recipe.to_json())), {}) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_forecast_counts_relations(place: Path) -> None:
    stage = Distill(teacher=str(place / "teacher"), loss="embedding_cosine", features="relation", **FEW)
    model = outlook(place, "narrow")
    more = stage.forecast(model).memory_bytes - replace(stage, features=None).forecast(model).memory_bytes
    assert more == 4 * 6 * 3 * 3 * 4 * 12 * 12  # copies, relations, heads, rows, tokens by tokens


def embed(directory: Path, words: str) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    with torch.no_grad():
        states: torch.Tensor = model(**tokenizer(words, return_tensors="pt"))[0]
    return states[0].mean(0)


def test_cut_taught_and_quantised_an_encoder_loads_as_any_other(place: Path, tmp_path: Path) -> None:
    teacher = str(place / "teacher")
    recipe = ck.Recipe(
        model=teacher,
        data=DataSpec(source=str(place / "sentences.tsv"), label=""),
        stages=(
            ck.Prune("cut", options={"layers": 2}),
            Distill(loss=["embedding_cosine", "pairwise"], features=RELATION, **{**FEW, "steps": 40}),
            ck.Quantize("rtn", scheme="w8a8"),
        ),
        device="cpu",
    )
    artifact = ck.run(recipe, tmp_path / "out", keep_stages=True)
    result = artifact.manifest["stages"][1]["result"]
    assert result["metrics"]["engine"] == "single"
    assert result["metrics"]["validation_loss"] < 0.8 * result["metrics"]["validation_loss_before"]
    assert result["metrics"]["final_parts"].keys() == {"embedding_cosine", "pairwise", "relation"}
    assert any("does not reach pooler.dense" in warning for warning in result["warnings"])
    model, told = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    near = torch.nn.functional.cosine_similarity(
        embed(place / "teacher", "w9 w20 w33"), embed(tmp_path / "out", "w9 w20 w33"), dim=0
    )
    assert near > 0.8
    table = ck.report(artifact).table()
    assert "size on disk" in table
    assert "bits" not in table  # of a byte: an encoder predicts none


def test_a_classifier_learns_its_teachers_classes(place: Path, tmp_path: Path) -> None:
    stage = Distill(
        teacher=str(place / "three"), loss="class_logits", temperature=2.0, cross_entropy_weight=0.1
    )
    stage = replace(stage, **{**FEW, "steps": 60})
    data = DataSpec(source=str(place / "sentences.tsv"), examples=True)
    recipe = ck.Recipe(model=str(place / "other-three"), data=data, stages=(stage,), device="cpu")
    artifact = ck.run(recipe, tmp_path / "out", measures=())
    metrics = artifact.manifest["stages"][0]["result"]["metrics"]
    assert metrics["validation_loss"] < 0.8 * metrics["validation_loss_before"]
    assert metrics["final_parts"].keys() == {"class_logits", "cross_entropy", "agreement"}
    _, told = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


@pytest.mark.parametrize("column", ["", "label"])
def test_classes_that_the_model_lacks_are_told(place: Path, tmp_path: Path, column: str) -> None:
    data = DataSpec(source=str(place / "sentences.tsv"), examples=True, column="sentence", label=column)
    stage = Distill(loss="class_logits", cross_entropy_weight=0.5, **FEW)
    recipe = ck.Recipe(model=str(place / "two"), data=data, stages=(stage,), device="cpu")
    told = "got classes up to 2" if column else "got rows without a class"
    with pytest.raises(DataError, match=f"expected classes from 0 to 1, {told}"):
        ck.run(recipe, tmp_path / "out", measures=())


def test_a_class_of_validation_rows_alone_that_the_model_lacks_is_told(place: Path, tmp_path: Path) -> None:
    """The second of all rows is always held out."""
    rows = ["sentence\tlabel", "w9 w20\t0", "w3 w4 w5\t2", *(f"w{i} w{i + 1}\t{i % 2}" for i in range(6, 40))]
    (tmp_path / "rare.tsv").write_text("\n".join(rows))
    data = DataSpec(source=str(tmp_path / "rare.tsv"), examples=True)
    stage = Distill(loss="class_logits", cross_entropy_weight=0.5, **FEW)
    recipe = ck.Recipe(model=str(place / "two"), data=data, stages=(stage,), device="cpu")
    with pytest.raises(DataError, match="expected classes from 0 to 1, got classes up to 2"):
        ck.run(recipe, tmp_path / "out", measures=())


def test_a_language_model_learns_relations_beside_its_loss(place: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "deep", seed=1, num_hidden_layers=4, initializer_range=0.2)
    stage = Distill(teacher=str(tmp_path / "deep"), features=RELATION, **{**FEW, "steps": 30})
    (tmp_path / "text.txt").write_text("\n\n".join(f"The {i}th story is about {i * i}." for i in range(200)))
    recipe = ck.Recipe(
        model=str(place / "llama"),
        data=DataSpec(source=str(tmp_path / "text.txt")),
        stages=(stage,),
        device="cpu",
    )
    artifact = ck.run(recipe, tmp_path / "out", measures=())
    metrics = artifact.manifest["stages"][0]["result"]["metrics"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"]
    assert metrics["final_parts"].keys() == {"forward_kl", "relation", "agreement"}
