"""Distill and Finetune as stages: what they refuse, what they forecast, what they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, outlook, stories, tiny_llama
from transformers import BertConfig, BertModel, GraniteConfig, GraniteForCausalLM, OPTConfig, OPTForCausalLM

from compresskit import modeling
from compresskit.data.spec import DataSpec
from compresskit.distill.finetune import Finetune
from compresskit.distill.stage import Distill
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.stage import StageContext, StageResult
from compresskit.training.outcome import TrainOutcome

FEW = {"steps": 6, "batch_size": 4, "context_length": 24, "learning_rate": 1e-2, "checkpoint_every": 0}


@dataclass(frozen=True)
class Kept:
    layer: str
    kind: ClassVar[str] = "zeros"

    def broken(self, made: Any, now: Any) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Gridded(Kept):
    kind: ClassVar[str] = "grid"


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    path = tmp_path / "text.txt"
    path.write_text(stories())
    return DataSpec(source=str(path))


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path / "model")))


def run(
    stage: Distill | Finetune, source: ModelSource, text: DataSpec, place: Path, **changes: Any
) -> tuple[StageResult, Path]:
    out, scratch = place / "out", place / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir()
    settings: dict[str, Any] = {"original": source.directory, "cache": place / "cache", "device": "cpu"}
    context = StageContext(out=out, scratch=scratch, data=text, **settings | changes)
    return stage.run(source, context), out


def test_the_best_weights_that_are_kept_are_counted_on_the_disk(source: ModelSource, text: DataSpec) -> None:
    plain, kept = Finetune(**FEW), Finetune(**FEW, keep_best=True, eval_every=2)
    forecasts = [stage.forecast(outlook(source, data=text)) for stage in (plain, kept)]
    assert [f.scratch_bytes for f in forecasts] == [0, 8 * source.anatomy.num_parameters]


def test_finetune_lowers_the_loss_and_writes_a_model(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    result, out = run(Finetune(**FEW), source, text, tmp_path / "stage")
    made = open_model(str(out))
    assert made.names() == source.names()
    assert result.metrics["final_loss"] < result.metrics["first_loss"]
    assert result.metrics["validation_loss"] < 6
    assert result.warnings == ()
    assert {layer.bits for layer in result.layers} == {32.0}
    json.dumps(dict(result.metrics))
    record = json.loads((tmp_path / "stage" / "scratch" / "record.json").read_text())
    assert record["seconds"] > 0
    assert "seconds" not in result.metrics, "a manifest is the same whenever a run is repeated"


def test_the_result_is_the_same_bytes_twice(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    results = [run(Finetune(**FEW), source, text, tmp_path / name) for name in "ab"]
    files = [{p.name: p.read_bytes() for p in out.iterdir()} for _, out in results]
    assert files[0] == files[1]
    assert results[0][0] == results[1][0]


def test_distil_brings_a_pruned_student_back_to_its_teacher(text: DataSpec, tmp_path: Path) -> None:
    """The teacher is the model before the first stage; every zero stays. Wide weights give it opinions."""
    source = open_model(str(tiny_llama(tmp_path / "wide", initializer_range=0.2)))
    student = tmp_path / "student"
    student.mkdir()
    for path in source.directory.iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    tensors = load_file(student / "model.safetensors")
    layers = [n.removesuffix(".weight") for n in tensors if "proj" in n]
    for layer in layers:
        tensors[f"{layer}.weight"][:, ::2] = 0
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    held = tuple(Kept(layer) for layer in layers)
    stage = Distill(**FEW | {"steps": 20})
    result, out = run(
        stage, open_model(str(student)), text, tmp_path / "s", promises=held, original=source.directory
    )
    assert result.metrics["final_loss"] < 0.7 * result.metrics["first_loss"]
    assert result.metrics["kernels"] == {"linear_divergence": "reference"}
    made = load_file(out / "model.safetensors")
    for layer in layers:
        assert not made[f"{layer}.weight"][:, ::2].any()
    zeros = {layer.name: layer.zero_fraction for layer in result.layers}
    assert all(zeros[layer] == 0.5 for layer in layers)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_tells_the_result(
    source: ModelSource, text: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """Whatever stands in the directory: rank 0 may have finished it long before the others look."""
    tiny_llama(tmp_path / "s" / "out")
    outcome = TrainOutcome(
        steps=1,
        first_loss=2.0,
        final_loss=1.0,
        validation_loss=None,
        skipped_steps=0,
        engine="ddp",
        processes=2,
        parameter_bytes=1,
    )
    monkeypatch.setattr("compresskit.training.stage.train", lambda job: outcome)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("RANK", rank)
    result, _ = run(Finetune(**FEW), source, text, tmp_path / "s")
    assert bool(result.metrics) == (rank == "0")


def test_a_loss_that_does_not_fall_is_told(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    stage = Finetune(**FEW | {"learning_rate": 1e-12, "steps": 2})
    result, _ = run(stage, source, text, tmp_path / "s")
    if result.metrics["final_loss"] >= result.metrics["first_loss"]:
        assert "did not fall" in result.warnings[0]
    else:
        assert result.warnings == ()


@pytest.mark.parametrize(("dtype", "told"), [("auto", False), ("float32", False), ("bfloat16", True)])
def test_a_dtype_that_training_does_not_follow_is_told(
    source: ModelSource, text: DataSpec, tmp_path: Path, dtype: str, told: bool
) -> None:
    result, out = run(Finetune(**FEW), source, text, tmp_path / "s", dtype=dtype)
    assert any("set the stage's precision" in warning for warning in result.warnings) == told
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_training_after_quantisation_is_refused(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Put this stage before the quantisation"):
        run(Finetune(**FEW), source, text, tmp_path / "s", promises=(Gridded("model.layers.0.mlp.up_proj"),))


def test_faults_of_all_kinds_come_together(source: ModelSource) -> None:
    stage = Distill(
        loss="forward_k", temperature=0.0, cross_entropy_weight=2.0, context_length=4096, optimizer="muno"
    )
    where = [f.where for f in stage.faults(outlook(source), "stages[0]")]
    assert where == [
        f"stages[0].{n}"
        for n in ("optimizer", "context_length", "loss", "temperature", "cross_entropy_weight")
    ]
    assert Distill().faults(outlook(source), "s") == []
    assert Finetune().faults(outlook(source), "s") == []


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    bert = open_model(str(tmp_path / "bert"))
    assert "expected a causal language model" in str(Finetune().faults(outlook(bert), "s")[0])


def tiny_opt(directory: Path) -> Path:
    """A model that gives each token the position it has in the row, whatever it is told."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=258,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        tie_word_embeddings=True,
    )
    OPTForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_documents_that_see_each_other_need_consent(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """Refused by the plan from the configuration alone, and by the run from the weights themselves."""
    opt = open_model(str(tiny_opt(tmp_path / "opt")))
    for stage in (Finetune(**FEW), Distill(**FEW)):
        (fault,) = stage.faults(outlook(opt), "stages[0]")
        assert fault.where == "stages[0]"
        assert "cross_documents: true" in fault.cure
        with pytest.raises(PlanError, match="cross_documents: true"):
            run(stage, opt, text, tmp_path / stage.kind)
    (fault,) = Distill(teacher=str(opt.directory)).faults(outlook(source), "stages[0]")
    assert fault.where == "stages[0].teacher"
    with pytest.raises(PlanError, match="teacher: expected a model that keeps documents apart"):
        run(Distill(teacher=str(opt.directory), **FEW), source, text, tmp_path / "taught")
    consent = replace(text, cross_documents=True)
    stage = Finetune(data=consent, **FEW)
    assert stage.faults(outlook(opt), "s") == []
    result, _ = run(stage, opt, text, tmp_path / "consent")
    assert result.metrics["final_loss"] < result.metrics["first_loss"]


def test_a_teacher_whose_logits_are_scaled_is_refused(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    config = GraniteConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    byte_tokenizer().save_pretrained(tmp_path / "granite")
    stage = Distill(teacher=str(tmp_path / "granite"), **FEW)
    (fault,) = stage.faults(outlook(source), "stages[0]")
    assert (fault.where, fault.got) == ("stages[0].teacher", "logits_scaling=8.0")
    with pytest.raises(PlanError, match="logits_scaling=8"):
        run(stage, source, text, tmp_path / "s")


@pytest.mark.parametrize("trust", [False, True])
def test_trust_reaches_the_teacher_and_both_tokenizers(
    source: ModelSource, text: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    asked: list[tuple[str, bool]] = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, trust_remote_code: bool = False, **others: Any) -> Any:
            asked.append((real.__name__, trust_remote_code))
            return real(*args, trust_remote_code=trust_remote_code, **others)

        return call

    for module in ("distill.vocabulary", "distill.lesson", "distill.teacher", "training.job"):
        for name in ("open_model", "load_tokenizer", "load_model"):
            if module != "training.job" or name != "load_model":  # there a source brings its own answer
                path = f"compresskit.{module}.{name}"
                monkeypatch.setattr(path, noting(getattr(modeling, name)), raising=False)
    teacher = tiny_llama(tmp_path / "teacher", seed=1)
    run(Distill(teacher=str(teacher), **FEW), source, text, tmp_path / "s", trust_remote_code=trust)
    assert {name for name, _ in asked} == {"open_model", "load_tokenizer", "load_model"}
    assert {trusted for _, trusted in asked} == {trust}


def other_vocabulary(directory: Path) -> Path:
    tiny_llama(directory)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(data))
    return directory


def test_another_vocabulary_is_refused_before_weights_are_read(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    teacher = other_vocabulary(tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    (fault,) = Distill(teacher=str(teacher)).faults(outlook(source), "stages[0]")
    assert fault.where == "stages[0].teacher"
    assert "2 tokens that differ" in fault.got
    assert "'a' is " in fault.got
    with pytest.raises(PlanError, match="the same token ids"):
        run(Distill(teacher=str(teacher), **FEW), source, text, tmp_path / "s")


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(258, 264), (272, 264)])
def test_padded_vocabularies_that_agree_are_cut(
    text: DataSpec, tmp_path: Path, student_rows: int, teacher_rows: int
) -> None:
    """Padding must not leak: a teacher with padding teaches exactly as one without."""
    student = open_model(str(tiny_llama(tmp_path / "student", seed=1, vocab_size=student_rows)))
    teacher = tiny_llama(tmp_path / "teacher", vocab_size=teacher_rows, tie_word_embeddings=False)
    stage = Distill(teacher=str(teacher), **FEW)
    assert stage.faults(outlook(student), "s") == []
    result, out = run(stage, student, text, tmp_path / "s")
    assert result.metrics["final_loss"] < result.metrics["first_loss"]
    assert open_model(str(out)).config.vocab_size == student_rows


def test_too_few_rows_for_the_tokens_are_refused(source: ModelSource, tmp_path: Path) -> None:
    teacher = tiny_llama(tmp_path / "teacher", vocab_size=250)
    (fault,) = Distill(teacher=str(teacher)).faults(outlook(source), "s")
    assert "250 in the teacher" in fault.got


def test_an_absent_teacher_is_told(source: ModelSource, tmp_path: Path) -> None:
    faults = Distill(teacher=str(tmp_path / "none")).faults(outlook(source), "s")
    assert faults
    assert faults[0].where.startswith("s.teacher")


def test_the_forecast_counts_the_teacher_and_the_shards(source: ModelSource) -> None:
    alone = Finetune(**FEW).forecast(outlook(source))
    taught = Distill(**FEW).forecast(outlook(source))
    assert taught.memory_bytes - alone.memory_bytes == source.bytes
    assert alone.memory_bytes > 16 * source.anatomy.num_parameters
    assert alone.layers == len(source.anatomy.linears)
    sharded = Finetune(**FEW | {"processes": 2, "strategy": "fsdp"}).forecast(outlook(source))
    assert sharded.memory_bytes < alone.memory_bytes
    assert sharded.notes


def test_finetune_on_a_real_model(shared_data: Path, tmp_path: Path) -> None:
    """15M tokens of training went into this model: ten small steps must not harm it."""
    source = open_model(str(shared_data / "models" / "stories260K"))
    data = DataSpec(source=str(shared_data / "tinystories" / "train_first1000.jsonl"), documents=200)
    stage = Finetune(steps=5, batch_size=4, context_length=128, learning_rate=1e-4, checkpoint_every=0)
    result, out = run(stage, source, data, tmp_path / "s")
    assert 1.0 < result.metrics["first_loss"] < 1.8
    assert result.metrics["validation_loss"] < 1.8
    assert torch.isfinite(open_model(str(out)).tensor("model.embed_tokens.weight")).all()
