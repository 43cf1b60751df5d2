"""The stage: what it refuses, what it leaves behind, and what a restart changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from broken import broken_off_in
from click.testing import CliRunner
from tiny import byte_tokenizer, stories, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

import compresskit as ck
from compresskit.cli import main
from compresskit.data.spec import DataSpec
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.sparse.pattern import parse_pattern
from compresskit.sparse.train import SparseTrain
from compresskit.stage import StageResult
from tests.sparse.test_prune_stage import outlook
from tests.sparse.test_prune_stage import run as run_stage

FEW: dict[str, Any] = {
    "steps": 12,
    "batch_size": 4,
    "context_length": 24,
    "learning_rate": 1e-2,
    "checkpoint_every": 0,
}
OFTEN = {"update_every": 3}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(stories())
    return DataSpec(source=str(path))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path_factory.mktemp("model"))))


def run(
    stage: SparseTrain, source: ModelSource, text: DataSpec, place: Path
) -> tuple[StageResult, ModelSource]:
    return run_stage(stage, source, place, Path(text.source))


CASES = [("gradual", "80%:layer"), ("gradual", "75%"), ("gradual", "2:4"), ("set", "80%:layer")]
CASES += [("rigl", "80%:layer"), ("srste", "2:4")]
CASES += [("movement", "75%"), ("movement", "2:4"), ("gradual", "75%:4x8")]
CASES += [("maskllm", "2:4"), ("maskllm", "1:4")]
OWN_TIME = ("srste", "maskllm")
"""Methods without an ``update_every``: their zeros are new in every step."""


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_the_promised_zeros_are_made(
    method: str, pattern: str, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    options = {} if method in OWN_TIME else OFTEN
    stage = SparseTrain(method=method, pattern=pattern, options=options, **FEW)
    assert stage.faults(outlook(source), "s") == []
    result, made = run(stage, source, text, tmp_path)
    assert {p.layer for p in result.promises} == {n for n in source.anatomy.linears if n != "lm_head"}
    for promise in result.promises:
        assert promise.broken(made, made) == ()
        now_OI = made.weight_OI(promise.layer)
        wanted = parse_pattern(promise.pattern).zero_fraction  # type: ignore[attr-defined]
        assert int((now_OI == 0).sum()) == round(wanted * now_OI.numel())
    assert result.warnings == ()
    assert stage.forecast(outlook(source)).layers == len(result.promises)
    assert made.tensor("lm_head.weight").count_nonzero() == made.tensor("lm_head.weight").numel()


AFTER = {
    "gradual": SparseTrain(pattern="80%:layer", options=OFTEN, **FEW),
    "srste": SparseTrain(method="srste", pattern="1:4", **FEW),
    "movement": SparseTrain(method="movement", pattern="80%:layer", options=OFTEN, **FEW),
}


@pytest.mark.parametrize("then", AFTER.values(), ids=AFTER)
def test_zeros_of_an_earlier_stage_stay(
    then: SparseTrain, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    stages = [ck.Prune("magnitude", pattern="2:4"), then, ck.Quantize("rtn", scheme="w8a16")]
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=stages)
    artifact = ck.run(recipe, tmp_path / "out", measures=(), keep_stages=True)
    checks = artifact.manifest["stages"][-1]["checks"]
    assert checks["zeros"] == {"checked": 28, "kept": 28}
    first, last = (open_model(str(artifact.directory / "stages" / n)) for n in ("1-prune", "2-sparse_train"))
    before_OI, now_OI = first.weight_OI(LAYER), last.weight_OI(LAYER)
    assert not now_OI[before_OI == 0].any()
    assert int((now_OI == 0).sum()) == round(parse_pattern(str(then.pattern)).zero_fraction * now_OI.numel())


def test_a_weight_that_is_stored_the_other_way_round(text: DataSpec, tmp_path: Path) -> None:
    """GPT-2 keeps (I, O): groups run along the inputs all the same."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    source = open_model(str(tmp_path / "model"))
    stage = SparseTrain(pattern="2:4", options=OFTEN, **FEW)
    assert stage.faults(outlook(source), "s") == []
    result, made = run(stage, source, text, tmp_path / "s")
    assert [p.broken(made, made) for p in result.promises] == [()] * 4
    (fault,) = SparseTrain(method="srste", pattern="2:4").faults(outlook(source), "s")
    assert "Add these layers to ignore" in fault.cure


@pytest.mark.parametrize("method", ["gradual", "srste"])
def test_stored_in_bfloat16_the_zeros_are_as_many(method: str, text: DataSpec, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model", dtype=torch.bfloat16)))
    how: dict[str, Any] = {"method": "srste", "pattern": "1:4"} if method == "srste" else {"options": OFTEN}
    stage = SparseTrain(precision="bf16", loss="forward_kl", **how, **FEW)
    result, made = run(stage, source, text, tmp_path / "s")
    assert made.dtype(f"{LAYER}.weight") == torch.bfloat16
    assert result.metrics["final_loss"] > result.metrics["first_loss"], "its teacher is what it was at first"
    assert result.warnings == ()
    assert [p.broken(made, made) for p in result.promises] == [()] * len(result.promises)


def test_layers_the_pattern_does_not_fit_may_be_skipped(text: DataSpec, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model", intermediate_size=44)))
    stage = SparseTrain(pattern="4:8", options=OFTEN, **FEW | {"steps": 4})
    (fault,) = stage.faults(outlook(source), "s")
    assert fault.where == "s.pattern"
    assert "on_indivisible" in fault.cure
    result, made = run(replace(stage, on_indivisible="skip"), source, text, tmp_path / "s")
    assert "4:8 does not fit 2 layers, which stay dense" in result.warnings[0]
    assert made.weight_OI("model.layers.0.mlp.down_proj").all()
    assert len(result.promises) == 12


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("gradual", "4:8"), ("srste", "4:8"), ("movement", "4:8"), ("maskllm", "4:8"), ("gradual", "50%:8x8")],
)
def test_layers_the_pattern_does_not_fit_may_be_padded(
    method: str, pattern: str, text: DataSpec, tmp_path: Path
) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model", intermediate_size=44)))
    options = {} if method in OWN_TIME else OFTEN
    stage = SparseTrain(
        method=method, pattern=pattern, on_indivisible="pad", options=options, **FEW | {"steps": 4}
    )
    assert stage.faults(outlook(source), "s") == []
    result, made = run(stage, source, text, tmp_path / "s")
    assert f"{pattern} does not fit" in result.warnings[0]
    assert "which are padded with zeros: model.layers.0.mlp." in result.warnings[0]
    found = {p.layer: p for p in result.promises}
    down = found["model.layers.0.mlp.down_proj"]
    assert down.pattern == f"{pattern}:pad"  # type: ignore[attr-defined]
    assert found["model.layers.0.self_attn.q_proj"].pattern == pattern  # type: ignore[attr-defined]
    assert [p.broken(made, made) for p in result.promises] == [()] * 14
    down_OI = made.weight_OI(down.layer)
    if pattern == "4:8":
        assert ((down_OI == 0).sum(1) == 20).all()
    assert result.warnings[0] in stage.forecast(outlook(source)).notes


@pytest.mark.parametrize("method", ["set", "rigl", "srste", "movement", "maskllm"])
def test_who_does_not_make_blocks_says_so(method: str, source: ModelSource) -> None:
    (fault,) = SparseTrain(method=method, pattern="50%:8x8", steps=4).faults(outlook(source), "s")
    assert fault.where == "s.pattern"
    assert fault.got == "'50%:8x8'"
    assert fault.cure == f"Choose such a pattern, or another method than {method}."


@pytest.mark.parametrize("method", ["gradual", "rigl", "movement", "maskllm"])
def test_a_restart_gives_the_same_bytes(
    method: str, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """Nothing but the weights tells which are zero; the change before the checkpoint is not repeated."""
    how: dict[str, Any] = {"pattern": "2:4"} if method in OWN_TIME else {"options": {"update_every": 2}}
    stage = SparseTrain(method=method, **how, **FEW | {"checkpoint_every": 4})
    run(stage, source, text, tmp_path / "straight")
    with broken_off_in(step=8):
        run(stage, source, text, tmp_path / "broken")
    (tmp_path / "broken" / "out").rmdir()
    run(stage, source, text, tmp_path / "broken")
    record = json.loads((tmp_path / "broken" / "scratch" / "record.json").read_text())
    assert record["resumed_from"] == 4
    one, two = ((tmp_path / p / "out" / "model.safetensors").read_bytes() for p in ("straight", "broken"))
    assert one == two
    rmtree(tmp_path / "broken" / "out")
    other = {"tau_end": 0.1} if method in OWN_TIME else {"update_every": 3}
    run(replace(stage, options=other), source, text, tmp_path / "broken")
    record = json.loads((tmp_path / "broken" / "scratch" / "record.json").read_text())
    assert record["resumed_from"] == 0, "another schedule is another run"


@pytest.mark.parametrize(
    "how",
    [
        {"method": "movement", "pattern": "75%", "options": OFTEN},
        {"method": "maskllm", "pattern": "2:4", "options": {"norm_reward": 1e-2}},
    ],
    ids=["movement", "maskllm"],
)
def test_activation_checkpointing_changes_nothing(how: Any, text: DataSpec, tmp_path: Path) -> None:
    """Of layers outside the blocks neither, which are not computed once more."""
    source = open_model(str(tiny_llama(tmp_path / "model", tie_word_embeddings=False)))
    stage = SparseTrain(**how, ignore=(), **FEW)
    stage = replace(stage, micro_batch_size=2)
    _, once = run(stage, source, text, tmp_path / "once")
    _, again = run(replace(stage, activation_checkpointing=True), source, text, tmp_path / "again")
    for name in source.names():
        torch.testing.assert_close(again.tensor(name), once.tensor(name), msg=name)


def test_faults_come_together(source: ModelSource) -> None:
    stage = SparseTrain(
        pattern="90",
        options={"update_every": 0, "begn": 0.1},
        on_indivisible="skp",
        temperature=2.0,
    )
    found = stage.faults(outlook(source), "s")
    assert {f.where.removeprefix("s.") for f in found} == {
        "temperature",
        "on_indivisible",
        "update_every",
        "begn",
        "pattern",
    }
    assert "Did you mean: begin" in str(found)
    (fault,) = SparseTrain(method="gradul").faults(outlook(source), "s")
    assert "gradual" in fault.cure
    (fault,) = SparseTrain(targets=("nothing*",)).faults(outlook(source), "s")
    assert fault.where.startswith("s.targets")
    (fault,) = SparseTrain(ignore=()).faults(outlook(source), "s")
    assert "shares its weight with the token embedding" in fault.got
    for method in ("set", "rigl"):
        (fault,) = SparseTrain(method=method, pattern="2:4").faults(outlook(source), "s")
        assert (fault.where, fault.expected) == ("s.pattern", "a share of layers, such as 80%:layer")
    (fault,) = SparseTrain(method="srste", precision="fp16", pattern="2:4").faults(outlook(source), "s")
    assert fault.where == "s.precision"
    (fault,) = SparseTrain(method="srste", pattern="2:4", options={"end": 0.5}).faults(outlook(source), "s")
    assert fault.where == "s.end"
    for method in ("gradual", "movement"):
        early = {"begin": 0.5, "end": 0.5}
        (fault,) = SparseTrain(method=method, options=early, steps=9).faults(outlook(source), "s")
        assert (fault.where, fault.expected) == ("s.begin", "less than end: 0.5")
    (fault,) = SparseTrain(method="movement").faults(outlook(source), "s")
    assert fault.where == "s.steps"
    (fault,) = SparseTrain(loss="forward_k").faults(outlook(source), "s")
    assert "forward_kl" in fault.cure


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([ck.Quantize("rtn", scheme="w8a8"), SparseTrain(**FEW)], "Put this stage before the quantisation"),
        ([SparseTrain(**FEW), ck.Prune("cut", options={"layers": 1})], "Put the cut first"),
        ([ck.Prune("magnitude"), SparseTrain(method="set", **FEW)], "Use method gradual"),
        ([SparseTrain(**FEW), SparseTrain(method="rigl", **FEW)], "after 1-sparse_train, whose zeros"),
    ],
    ids=["quantize", "cut", "set", "rigl"],
)
def test_what_may_not_meet_is_refused_with_the_cure(
    stages: list[Any], said: str, source: ModelSource, text: DataSpec
) -> None:
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=stages)
    with pytest.raises(PlanError, match=said):
        ck.plan(recipe)


def test_zeros_may_move_in_layers_without_earlier_ones(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """The plan and the run agree on it, whether the earlier zeros are of this chain or of the model's own."""
    before = ck.Prune("magnitude", targets=("*.q_proj", "*.k_proj"), pattern="2:4")
    meeting = SparseTrain(method="rigl", targets=("*.mlp.*", "*.q_proj"), options=OFTEN, **FEW)
    apart = replace(meeting, ignore=("*.q_proj",))
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=[before, meeting])
    with pytest.raises(
        PlanError, match=r"after 1-prune, .* such as those of model.layers.0.self_attn.q_proj"
    ):
        ck.plan(recipe)
    ck.run(replace(recipe, stages=(before, apart)), tmp_path / "both", measures=())
    ck.run(replace(recipe, stages=(before,)), tmp_path / "first", measures=())
    made = replace(recipe, model=str(tmp_path / "first"), stages=(meeting,))
    with pytest.raises(PlanError, match="after the stages that made this model"):
        ck.plan(made)
    assert len(ck.plan(replace(made, stages=(apart,))).stages) == 1
    assert not set(apart.layers(outlook(source))) & set(before.layers(outlook(source)))


def test_the_forecast_counts_what_a_method_holds(source: ModelSource) -> None:
    def bytes_of(**fields: Any) -> int:
        return SparseTrain(**FEW | fields).forecast(outlook(source)).memory_bytes

    linears = [linear for name, linear in source.anatomy.linears.items() if name != "lm_head"]
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    assert bytes_of(method="rigl") - bytes_of(method="set") == 4 * weights
    pair = {"processes": 2, "strategy": "fsdp"}
    assert bytes_of(method="rigl", **pair) - bytes_of(method="set", **pair) == 2 * weights
    assert bytes_of(method="srste", pattern="2:4") - bytes_of(pattern="2:4") == 4 * weights
    assert bytes_of(method="movement") - bytes_of() == (16 + 4) * weights
    largest, everything = 64 * 32, source.anatomy.num_parameters
    # Of 2:4, 1.5 logits a weight with gradient and moments, in place of those of the weights.
    logits = 24 * weights + 4 * everything + 4 * 11 * largest - (16 * everything + 28 * largest)
    groups = {"pattern": "2:4"}
    assert bytes_of(method="maskllm", **groups) - bytes_of(method="srste", **groups) == logits
    eighths = bytes_of(method="maskllm", pattern="4:8") - bytes_of(method="maskllm", **groups)
    assert eighths == 16 * (8.75 - 1.5) * weights + 4 * 6 * (8.75 - 1.5) * largest
    assert bytes_of(loss="forward_kl") - bytes_of() == source.bytes


def test_it_survives_the_recipe_file(tmp_path: Path) -> None:
    stage = SparseTrain(pattern="2:4", options={"end": 0.5}, loss="forward_kl", **FEW)
    path = tmp_path / "recipe.yaml"
    path.write_text(ck.Recipe(model="m", stages=[stage]).to_yaml())
    assert ck.load_recipe(path).stages == (stage,)
    path.write_text("model: m\nstages:\n  - sparse_train: {pattern: 0.8, update_every: 5, steps: 3}\n")
    assert ck.load_recipe(path).stages == (SparseTrain(pattern=0.8, options={"update_every": 5}, steps=3),)


def test_the_command_makes_the_recipe(source: ModelSource, text: DataSpec) -> None:
    arguments = ["sparse-train", str(source.directory), "--pattern", "75%", "--data", text.source]
    arguments += ["--steps", "7", "--set", "update_every=2", "--dry-run", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    stage = SparseTrain(pattern="75%", steps=7, options={"update_every": 2})
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=[stage])
    expected = ck.plan(recipe).to_json()["stages"]
    found = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert [{**s, "memory_bytes": 0} for s in found] == [{**s, "memory_bytes": 0} for s in expected]
    done = CliRunner().invoke(main, [*arguments[:-1], "--set", "update_every=never"])
    assert done.exit_code == 2
    assert "--set update_every" in done.output
