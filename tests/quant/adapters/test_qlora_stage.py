"""The stage in a recipe: every fault with its cure, chains that lose nothing, two processes like one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import projections
from safetensors.torch import load_file
from tiny import tiny_llama

import compresskit as ck
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.quant.adapters import outlook as adapters_outlook
from compresskit.quant.adapters.outlook import trained_parameters
from compresskit.quant.qlora import Qlora
from compresskit.stage import Outlook, StageContext

FIELDS: dict[str, Any] = {
    "rank": 4,
    "steps": 4,
    "batch_size": 4,
    "context_length": 32,
    "learning_rate": 1e-2,
    "checkpoint_every": 0,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"The {i}th story is about the number {i * i}." for i in range(100)))
    return str(path)


@pytest.fixture
def model(dense: ModelSource) -> Outlook:
    return Outlook(
        anatomy=dense.anatomy,
        config=dense.config,
        tokenizer=dense.directory,
        original=dense.directory,
        weight_bytes=4.0,
    )


def said(stage: Qlora, model: Outlook) -> str:
    return "\n".join(map(str, stage.faults(model, "stages[1]")))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": "lroa"}, ["stages[1].adapter", "Did you mean: lora"]),
        ({"base": "fp4"}, ["stages[1].base", "nf4"]),
        ({"rank": 0}, ["stages[1].rank", "at least 1"]),
        ({"rank": 20}, ["stages[1].rank", "at least the rank, 20", "k_proj"]),
        ({"alpha": 0}, ["stages[1].alpha"]),
        ({"dropout": 1.0}, ["stages[1].dropout"]),
        ({"ignore": ()}, ["lm_head, which shares its weight", "Add lm_head to ignore"]),
        ({"adapter": "prefix"}, ["finish merge of adapter prefix", "Set finish to adapter"]),
        (
            {"adapter": "prefix", "finish": "adapter", "context_length": 128},
            ["16 tokens of prefix", "Set context_length to 112"],
        ),
        (
            {
                "adapter": "prefix",
                "finish": "adapter",
                "context_length": 64,
                "activation_checkpointing": True,
            },
            ["activation_checkpointing", "use adapter lora"],
        ),
        ({"finish": "grid"}, ["a grid in force, or a scheme", "neither"]),
        ({"finish": "grid", "scheme": "w4a16-g48", "rounding": "rtn"}, ["48", "q_proj"]),
        ({"scheme": "w8a16"}, ["w8a16 with finish merge", "Set finish to grid"]),
        ({"loftq_rounds": 2, "base": "none"}, ["base none, which rounds nothing", "Use base nf4"]),
        ({"loftq_rounds": 2, "finish": "adapter"}, ["finish adapter", "Use finish merge"]),
        ({"loftq_rounds": 2, "merge_into": "original"}, ["Use merge_into trained"]),
        ({"processes": 2, "strategy": "fsdp"}, ["stages[1].strategy", "base none"]),
        ({"processes": 2, "strategy": "deepspeed", "zero_stage": 3}, ["stages[1].strategy", "base none"]),
        ({"optimizer": "paged_adamw_8bit"}, ["a GPU, whose memory is paged", "adamw_8bit"]),
    ],
    ids=str,
)
def test_each_fault_is_told_with_its_cure(
    changes: dict[str, Any], expected: list[str], model: Outlook
) -> None:
    rank = {} if "context_length" in changes else {"rank": 4}
    found = said(Qlora(**(rank | changes)), model)
    assert all(part in found for part in expected), found


def test_a_stage_as_it_stands_has_no_fault_and_tells_its_memory(model: Outlook, dense: ModelSource) -> None:
    stage = Qlora(rank=4)
    assert said(stage, model) == ""
    light = stage.forecast(model).memory_bytes
    assert light < replace(stage, base="none").forecast(model).memory_bytes
    linears = [dense.anatomy.linears[n] for n in projections(dense)]
    rank = sum(4 * (ln.in_features + ln.out_features) for ln in linears)
    assert trained_parameters(stage, dense.anatomy, dense.config, projections(dense)) == rank


@pytest.mark.parametrize(("package", "base"), [("peft", "none"), ("bitsandbytes", "nf4")])
def test_an_absent_package_is_told_with_what_installs_it(
    package: str, base: str, model: Outlook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters_outlook, "find_spec", lambda name: None if name == package else object())
    found = said(Qlora(rank=4, base=base), model)
    assert f"the package {package}" in found
    assert "pip install 'compresskit[qlora]'" in found


def test_weights_on_a_grid_want_a_finish_that_keeps_them_there(model: Outlook, dense: ModelSource) -> None:
    model = replace(model, layer_bits=dict.fromkeys(projections(dense), 4.5))
    assert "Set finish to grid" in said(Qlora(rank=4), model)
    assert "Set finish to grid" in said(Qlora(rank=4, finish="adapter"), model)
    assert said(Qlora(rank=4, finish="grid"), model) == ""
    assert "Use adapter lora" in said(Qlora(rank=4, finish="grid", adapter="dora"), model)
    assert "the grid in force is kept" in said(Qlora(rank=4, finish="grid", scheme="w8a16"), model)


def test_pruned_quantised_trained_keeps_every_zero_and_every_grid(
    dense: ModelSource, text: str, tmp_path: Path
) -> None:
    stages = [
        ck.Prune("magnitude", pattern="2:4"),
        ck.Qlora(**FIELDS),
        ck.Quantize("rtn", scheme="w4a16-g32"),
        ck.Qlora(**FIELDS | {"learning_rate": 5e-2}, finish="grid"),
    ]
    recipe = ck.Recipe(model=str(dense.directory), data=text, stages=stages)
    artifact = ck.run(recipe, tmp_path / "out", measures=())
    for state in artifact.manifest["stages"]:
        assert all(count["kept"] == count["checked"] > 0 for count in state["checks"].values())
    last = artifact.manifest["stages"][-1]
    assert last["checks"]["zeros"]["checked"] == last["checks"]["grid"]["checked"] == 14
    assert last["result"]["metrics"]["trained_parameters"] > 0


def test_a_new_grid_is_made_of_the_merged_weights(dense: ModelSource, text: str, tmp_path: Path) -> None:
    stage = ck.Qlora(**FIELDS, finish="grid", scheme="w8a16", rounding="rtn", base="none")
    artifact = ck.run(
        ck.Recipe(model=str(dense.directory), data=text, stages=[stage]), tmp_path / "out", measures=()
    )
    (state,) = artifact.manifest["stages"]
    assert state["checks"]["grid"] == {"checked": 14, "kept": 14}
    assert {"trained_parameters", "weight_relative_error"} <= set(state["result"]["metrics"])


def test_a_kept_adapter_is_published_loaded_and_last(dense: ModelSource, text: str, tmp_path: Path) -> None:
    stage = ck.Qlora(**FIELDS, finish="adapter", base="none")
    model, out = str(dense.directory), tmp_path / "out"
    artifact = ck.run(ck.Recipe(model=model, data=text, stages=[stage]), out, measures=())
    assert "adapter/adapter_model.safetensors" in artifact.manifest["files"]
    plain, adapted = open_model(out), ck.load(out)
    assert all(torch.equal(plain.tensor(n), dense.tensor(n)) for n in dense.names())
    ids = torch.arange(9)[None]
    with adapted.disable_adapter():
        before = adapted(input_ids=ids).logits
    assert not torch.equal(adapted(input_ids=ids).logits, before)
    assert type(adapted).__name__ == "PeftModelForCausalLM"
    with pytest.raises(PlanError, match="Put 1-qlora last"):
        ck.plan(ck.Recipe(model=model, data=text, stages=[stage, ck.Quantize("rtn")]))
    with pytest.raises(PlanError, match="an adapter beside it"):
        ck.plan(ck.Recipe(model=str(out), data=text, stages=[ck.Quantize("rtn")]))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_what_one_does(text: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        stage = Qlora(**FIELDS | {"batch_size": 8, "learning_rate": 1e-3}, processes=processes)
        (out / "out").mkdir(parents=True)
        context = StageContext(
            out=out / "out",
            scratch=out / "scratch",
            original=model,
            data=ck.DataSpec(source=text),
            device="cpu",
            cache=tmp_path / "cache",
        )
        (out / "scratch").mkdir()
        result = stage.run(ModelSource(model), context)
        found[processes] = result.metrics
        lines = (out / "scratch" / "losses.jsonl").read_text().splitlines()
        found[processes]["losses"] = [
            json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)
        ]
    one, two = (load_file(tmp_path / str(n) / "out" / "model.safetensors") for n in (1, 2))
    assert found[2]["engine"] == "ddp"
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=2e-6)
    # Adam divides by the size of a gradient, so that one of nearly nothing turns rounding into a whole step.
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
