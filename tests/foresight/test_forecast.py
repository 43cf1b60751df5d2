"""Forecasts of recipes from configurations alone: what fits, what is refused and why, what is recommended."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import tiny_llama
from transformers import LlamaConfig

import compresskit as ck
from compresskit.cli import main
from compresskit.errors import InputError, ModelError, PlanError
from compresskit.foresight.candidates import Row, combinations, weighed
from compresskit.foresight.devices import DEVICES, Machine, _named, amount, machine
from compresskit.foresight.forecast import Forecast, Foresight
from compresskit.foresight.table import told
from compresskit.progress import size


def config(path: Path, **changes: Any) -> Path:
    """A configuration without weights."""
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }
    path.write_text(LlamaConfig(**settings | changes).to_json_string())
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("configs")
    config(place / "small.json")
    config(place / "large.json", hidden_size=512, intermediate_size=1408, num_hidden_layers=24)
    return place


def devices(memory: str = "80GB", **changes: Any) -> Machine:
    return machine(**{"gpus": 4, "memory": memory, "gpu": "a100", **changes})


def forecast(place: Path, stage: Any, where: Machine) -> Forecast:
    (one,) = ck.foresee(ck.Recipe(model=str(place / "small.json"), stages=(stage,)), where).forecasts
    return one


def finetune(**changes: Any) -> ck.Finetune:
    return ck.Finetune(**{"batch_size": 16, "context_length": 128, "precision": "bf16", **changes})


@pytest.fixture(scope="module")
def plain(place: Path) -> Forecast:
    return forecast(place, finetune(), devices())


def rows_of(one: Forecast, strategy: str, checkpointing: str = "none") -> list[Row]:
    found = [r for r in one.rows if r.combination.strategy == strategy]
    return [r for r in found if r.combination.checkpointing == checkpointing]


def test_every_strategy_is_weighed_with_every_number_of_rows(plain: Forecast) -> None:
    for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        found = {r.combination.rows: r for r in rows_of(plain, strategy)}
        assert set(found) == {1, 2, 4}
        assert [found[n].passes for n in (1, 2, 4)] == [4, 2, 1]
        assert found[4].peak is not None
        assert found[4].peak.bytes == pytest.approx(sum(found[4].peak.terms.values()), abs=1)


def test_states_are_what_shapes_say(plain: Forecast) -> None:
    count = 2 * 512 * 128 + 128 + 6 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 352 + 2 * 128)
    assert plain.subject.model.anatomy.num_parameters == count
    (ddp,) = [r for r in rows_of(plain, "ddp") if r.passes == 1]
    assert ddp.peak is not None
    assert ddp.peak.terms["weights"] == 4 * count
    assert ddp.peak.terms["optimiser"] == 8 * count
    (fsdp,) = [r for r in rows_of(plain, "fsdp") if r.passes == 1]
    assert fsdp.peak is not None
    assert fsdp.peak.terms["weights"] == pytest.approx(count)  # 4 bytes over 4 processes
    assert fsdp.peak.bytes < ddp.peak.bytes


def test_recomputing_is_smaller_and_slower(plain: Forecast) -> None:
    for strategy in ("ddp", "fsdp"):
        (none,) = [r for r in rows_of(plain, strategy) if r.passes == 1]
        (full,) = [r for r in rows_of(plain, strategy, "full") if r.passes == 1]
        assert none.peak is not None
        assert full.peak is not None
        assert none.pace is not None
        assert full.pace is not None
        assert full.peak.terms["activations"] < none.peak.terms["activations"]
        assert full.pace.compute_s > 1.2 * none.pace.compute_s


def test_the_fastest_that_fits_comes_first(plain: Forecast) -> None:
    assert plain.best is plain.rows[0]
    fitting = [r for r in plain.rows if r.fits]
    assert fitting == list(plain.rows[: len(fitting)])
    speeds = [r.pace.tokens_s for r in fitting if r.pace]
    assert all(after <= 1.03 * before for before, after in pairwise(speeds))


def test_less_memory_has_the_states_divided_and_then_nothing_fits(place: Path, plain: Forecast) -> None:
    ddp = min(r.peak.bytes for r in plain.rows if r.peak and r.combination.strategy == "ddp")
    fsdp = min(r.peak.bytes for r in plain.rows if r.peak and r.combination.strategy == "fsdp")
    assert fsdp < 0.6 * ddp
    tight = forecast(place, finetune(), devices(f"{(ddp + fsdp) / 2 / 0.92}B"))
    assert tight.best is not None
    assert tight.best.combination.strategy in ("fsdp", "pipeline 4")
    none = forecast(place, finetune(), devices("1MB"))
    assert none.best is None
    assert none.rows[0].peak is not None
    assert none.rows[0].peak.bytes <= fsdp  # the least comes first


def test_rows_that_processes_cannot_share_are_refused_with_the_rule(place: Path) -> None:
    one = forecast(place, finetune(batch_size=6), devices())
    assert one.best is not None
    assert one.best.combination.strategy == "pipeline 4"  # whose ranks see the same rows
    alone = [r for r in one.rows if not r.combination.strategy.startswith(("tensor", "pipeline"))]
    assert {r.refused.partition(":")[0] for r in alone} == {"batch-divides"}
    assert all("Choose a batch_size" in r.refused for r in alone)


def test_fp16_is_refused_where_it_does_not_work_and_no_package_is_missed_elsewhere(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("deepspeed", "precision", "optimizer"):
        monkeypatch.setattr(f"compresskit.training.rules.{room}.find_spec", lambda name: None)
    one = forecast(place, finetune(precision="fp16"), devices())
    refused = {r.combination.strategy: r.refused.partition(":")[0] for r in one.rows if r.refused}
    offloaded = ("zero2 + offload", "zero3 + offload")
    sharded = dict.fromkeys(("fsdp", "tensor 4", "zero1", "zero2", "zero3", *offloaded), "fp16-sharded")
    assert refused.pop("pipeline 4").startswith("pipeline-")
    assert refused == sharded
    here = forecast(place, finetune(), replace(devices(), here=True))
    refused = {r.combination.strategy: r.refused.partition(":")[0] for r in here.rows if r.refused}
    assert refused.pop("pipeline 4").startswith("pipeline-")
    assert "tensor_parallel" in refused.pop("tensor 4")
    assert refused == dict.fromkeys(("zero1", "zero2", "zero3", *offloaded), "deepspeed-missing")


def test_one_device_divides_nothing(place: Path) -> None:
    one = forecast(place, finetune(), devices(gpus=1))
    refused = {r.combination.strategy: r.refused.partition(":")[0] for r in one.rows if r.refused}
    assert refused == dict.fromkeys(("ddp", "fsdp"), "one-process-shards-nothing")
    assert one.best is not None
    assert one.best.combination.strategy == "single"


def test_a_teacher_is_weighed_whole_and_divided(place: Path) -> None:
    stage = ck.Distill(teacher=str(place / "large.json"), batch_size=16, context_length=128)
    one = forecast(place, stage, devices())
    assert {r.combination.placement for r in one.rows} == {"replicate", "shard"}
    weights = one.subject.teacher.bytes if one.subject.teacher else 0
    assert weights > 10**8
    by_place = {
        r.combination.placement: r for r in rows_of(one, "fsdp") if r.passes == 1 and r.combination.rows == 4
    }
    whole, divided = by_place["replicate"], by_place["shard"]
    assert whole.peak is not None
    assert divided.peak is not None
    assert whole.pace is not None
    assert divided.pace is not None
    assert whole.peak.terms["teacher"] > weights
    assert divided.peak.terms["teacher"] < 0.6 * whole.peak.terms["teacher"]
    assert divided.pace.communication_s > whole.pace.communication_s


def test_adapters_have_few_states_and_frozen_bits(place: Path, plain: Forecast) -> None:
    lora = forecast(place, finetune(trainable="lora", rank=4), devices())
    frozen = forecast(place, ck.Qlora(batch_size=16, context_length=128, rank=4), devices())
    whole, factors, bits = (
        next(r.peak.terms for r in rows_of(one, "ddp") if r.peak and r.passes == 1)
        for one in (plain, lora, frozen)
    )
    assert factors["optimiser"] < 0.05 * whole["optimiser"]
    assert 0.5 * whole["weights"] < factors["weights"] < whole["weights"]  # frozen as they are stored
    assert bits["weights"] < 0.3 * whole["weights"]
    assert 0 < bits["frozen"] < 0.2 * whole["weights"]


def test_weights_frozen_in_few_bits_are_gathered_in_few_bits(place: Path, plain: Forecast) -> None:
    frozen = forecast(place, ck.Qlora(batch_size=16, context_length=128, rank=4), devices())
    for strategy in ("fsdp", "zero3"):
        whole, bits = (
            next(r.peak.terms["gathered"] for r in rows_of(one, strategy) if r.peak and r.passes == 1)
            for one in (plain, frozen)
        )
        assert 0 < bits < 0.5 * whole


def test_engines_that_divide_weights_divide_those_frozen_in_four_bits(place: Path) -> None:
    frozen = forecast(place, ck.Qlora(batch_size=16, context_length=128, rank=4), devices())
    held = {
        strategy: next(r.peak.terms["frozen"] for r in rows_of(frozen, strategy) if r.peak)
        for strategy in ("ddp", "fsdp", "zero3")
    }
    weights = held["ddp"] / (0.5 + 1 / 64)  # bytes of one, and of its part of a scale, which all keep
    for strategy in ("fsdp", "zero3"):
        assert held[strategy] == pytest.approx(weights * (0.5 / 4 + 1 / 64), rel=0.01)


def test_of_two_stages_each_is_told(place: Path) -> None:
    stages = (finetune(), ck.Qat(scheme="w8a8", batch_size=8, context_length=128))
    found = ck.foresee(ck.Recipe(model=str(place / "small.json"), stages=stages), devices())
    assert [one.subject.name for one in found.forecasts] == ["1-finetune", "2-qat"]
    peak = found.forecasts[1].rows[0].peak
    assert peak is not None
    assert peak.terms["masks"] > 0


@pytest.mark.parametrize(
    ("stages", "said"), [((), "a stage that trains"), ((ck.Quantize("rtn"),), "a stage that trains")]
)
def test_what_does_not_train_is_no_subject(place: Path, stages: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        ck.foresee(ck.Recipe(model=str(place / "small.json"), stages=stages), devices())


def test_a_configuration_that_is_not_there(place: Path) -> None:
    with pytest.raises(ModelError):
        ck.foresee(ck.Recipe(model=str(place / "none.json"), stages=(finetune(),)), devices())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80e9),
        ("40 GiB", 40 * 2**30),
        ("400Gbit", 50e9),
        ("50GB/s", 50e9),
        ("80gb", None),
        ("1Tbps", None),
    ],
)
def test_amounts(text: str, count: float | None) -> None:
    if count is None:
        with pytest.raises(ValueError, match=text):
            amount(text)
    else:
        assert amount(text) == count


def test_everything_wrong_with_a_machine_is_told_together() -> None:
    with pytest.raises(InputError) as caught:
        machine(gpus=0, nodes=0, gpu="h1000", memory="much", link="fast", efficiency=2)
    assert len(caught.value.faults) == 6
    assert "h100" in str(caught.value)


def test_slower_links_show_in_the_step(place: Path) -> None:
    slow, fast = (
        forecast(place, finetune(), devices(nodes=2, gpus=2, link=link)) for link in ("1Gbit", "400Gbit")
    )
    for strategy in ("ddp", "fsdp"):
        paces = [rows_of(one, strategy)[0].pace for one in (slow, fast)]
        assert paces[0] is not None
        assert paces[1] is not None
        assert paces[0].communication_s == pytest.approx(400 * paces[1].communication_s)
        assert paces[0].exposed_s > 0


def test_the_table_tells_the_choice_and_the_refusals(place: Path) -> None:
    recipe = ck.Recipe(model=str(place / "small.json"), stages=(finetune(precision="fp16"),))
    text = told(ck.foresee(recipe, devices(nodes=2)))
    assert "2 x 4 A100 SXM 80 GB" in text
    assert "400 Gbit/s between nodes" in text
    assert "Recommended: processes: 8, strategy: ddp" in text
    assert "refused: fp16-sharded" in text
    assert f"the host's memory: {size(4 * 1_238_656)}, {size(16 * 1_238_656)} on a node" in text
    # Once each: fsdp, hsdp, with tensor parallelism, pipelines, and the stages of ZeRO, two with offload.
    assert text.count("refused") == 9


def test_json_has_every_row(place: Path) -> None:
    recipe = ck.Recipe(model=str(place / "small.json"), stages=(finetune(),))
    found: Foresight = ck.foresee(recipe, devices())
    plain = json.loads(json.dumps(found.to_json()))
    (stage,) = plain["stages"]
    assert len(stage["rows"]) == len(found.forecasts[0].rows)
    chosen = stage["recommended"]
    assert chosen == stage["rows"][0]
    assert sum(chosen["terms_bytes"].values()) == pytest.approx(chosen["peak_bytes"], abs=12)
    assert chosen["set"]["processes"] == 4
    assert plain["machine"]["device"]["name"] == DEVICES["a100"].name


def written(place: Path, model: Path) -> str:
    path = place / "recipe.yaml"
    path.write_text(f"model: {model}\nstages:\n  - finetune: {{batch_size: 16, context_length: 64}}\n")
    return str(path)


def test_the_command_reads_a_configuration(place: Path) -> None:
    recipe = written(place, place / "small.json")
    asked = ["plan", recipe, "--gpus", "8", "--nodes", "2", "--gpu-memory", "40GiB", "--json"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert found["machine"]["gpus"] == 8
    assert found["machine"]["device"]["memory_bytes"] == 40 * 2**30
    assert found["stages"][0]["recommended"]["fits"]


def test_the_command_plans_for_this_machine(place: Path, tmp_path: Path) -> None:
    recipe = written(place, tiny_llama(tmp_path / "model"))
    result = CliRunner().invoke(main, ["plan", recipe, "--here", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "this CPU" in result.output
    assert "Recommended: " in result.output
    assert "single" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", "2"), "missing --gpus"),
        (("--here", "--gpus", "2"), "--here is this machine"),
        (("--gpus", "2", "--verify"), "--verify needs --here"),
    ],
)
def test_options_that_contradict_each_other(place: Path, options: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(main, ["plan", written(place, place / "small.json"), *options])
    assert result.exit_code == 2
    assert said in result.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Wider(ck.Finetune):
    """A stage with a field for one way more."""

    offload: str = "none"


def test_ways_are_asked_about_where_the_stage_has_fields_for_them(place: Path) -> None:
    one = forecast(place, Wider(batch_size=16, context_length=128), devices(nodes=2, gpus=2))
    count = one.subject.model.anatomy.num_parameters
    copies, divided, offloaded = (
        next(r.peak.terms for r in rows_of(one, name) if r.peak and r.passes == 1)
        for name in ("hsdp", "fsdp", "zero2 + offload")
    )
    assert copies["weights"] == pytest.approx(2 * count)  # divided by the two of a node
    assert divided["weights"] == pytest.approx(count)
    assert offloaded["optimiser"] == offloaded["masters"] == 0
    (parallel,) = [r for r in rows_of(one, "fsdp x tensor 2") if r.passes == 1]
    assert parallel.peak is not None
    # All but 13 norms lie in four parts.
    assert parallel.peak.terms["weights"] == pytest.approx(count, abs=4 * 13 * 128)


def test_a_model_that_cannot_be_divided_so_is_refused(place: Path, plain: Forecast) -> None:
    """Two key-value heads for four ranks; six blocks for eight stages, two in each of four ranks."""
    assert all("num_key_value_heads" in r.refused for r in plain.rows if r.combination.strategy == "tensor 4")
    one = forecast(place, finetune(pipeline_schedule="interleaved"), devices())
    (few,) = [r for r in rows_of(one, "pipeline 4") if r.combination.rows == 4]
    assert "at least 8 blocks" in few.refused


@pytest.mark.parametrize("strategy", ["tensor 4", "pipeline 4"])
def test_ranks_that_share_a_model_are_predicted(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key-value heads for four, and more blocks than ranks."""
    monkeypatch.setattr("compresskit.foresight.forecast.candidates", lambda *_: [])  # but for these two
    config(tmp_path / "small.json", num_key_value_heads=4, num_hidden_layers=8, hidden_size=256)
    where = devices(link="1Gbit")
    subject = forecast(tmp_path, finetune(), where).subject
    ways = {c.strategy: c for c in combinations(subject, where) if (c.checkpointing, c.rows) == ("none", 4)}
    whole, divided = (weighed(subject, where, ways[name]) for name in ("ddp", strategy))
    assert whole.peak is not None
    assert whole.pace is not None
    assert divided.peak is not None
    assert divided.pace is not None
    assert divided.passes == 4
    assert 0.25 < divided.peak.terms["weights"] / whole.peak.terms["weights"] < 0.45
    assert divided.peak.terms["optimiser"] == pytest.approx(2 * divided.peak.terms["weights"])
    assert divided.pace.compute_s > whole.pace.compute_s  # the head is not shared, or ranks wait
    assert divided.pace.exposed_s == divided.pace.communication_s > 0


def test_the_recipes_own_way_is_no_part_of_the_others(place: Path) -> None:
    again = {"activation_checkpointing": True, "checkpoint_blocks": 2}
    asked = finetune(strategy="fsdp", replicas=2, processes=4, **again)
    one = forecast(place, asked, devices(nodes=2, gpus=2))
    assert not any(r.refused for name in ("ddp", "fsdp", "hsdp") for r in rows_of(one, name))
    assert {r.combination.changes["replicas"] for r in rows_of(one, "fsdp")} == {1}
    assert {r.combination.changes["replicas"] for r in rows_of(one, "hsdp")} == {2}


@pytest.mark.parametrize(("said", "known"), [("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("Voodoo 2", "")])
def test_a_gpu_is_known_by_its_longest_name(said: str, known: str) -> None:
    assert _named(said) is DEVICES.get(known)


def test_a_forecast_looks_at_the_model_that_a_plan_looks_at(tmp_path: Path) -> None:
    """Of the first stage, where the machine is the same."""
    recipe = ck.Recipe(model=str(tiny_llama(tmp_path / "model")), stages=(finetune(),), device="cpu")
    (stage,) = ck.plan(recipe).stages
    (one,) = ck.foresee(recipe, devices()).forecasts
    assert one.subject.model == replace(stage.before, device="cuda", devices=0)
