"""The stage in a recipe: every fault with its cure, chains that lose nothing, two processes like one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import stories, tiny_llama

import compresskit as ck
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.quant.qlora import Qlora
from compresskit.stage import Outlook, StageContext
from compresskit.training.adapters import outlook as adapters_outlook
from compresskit.training.adapters.outlook import trained_parameters
from compresskit.training.write import write_checkpoint

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
    path.write_text(stories(100))
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(tiny_llama(tmp_path_factory.mktemp("dense")))


def projections(source: ModelSource) -> tuple[str, ...]:
    return tuple(name for name in source.anatomy.linears if name.endswith("proj"))


@pytest.fixture
def model(dense: ModelSource) -> Outlook:
    return Outlook(
        anatomy=dense.anatomy,
        config=dense.config,
        tokenizer=dense.directory,
        original=dense.directory,
        weight_bytes=4.0,
    )


def test_four_bits_of_an_odd_layer_cannot_be_split(model: Outlook) -> None:
    linears = dict(model.anatomy.linears)
    odd = next(name for name in linears if name.endswith("q_proj"))
    linears[odd] = replace(linears[odd], out_features=63, in_features=63)
    model = replace(model, anatomy=replace(model.anatomy, linears=linears))
    split = Qlora(steps=2, batch_size=2, context_length=32, processes=2, strategy="fsdp")
    found = [str(fault) for fault in split.faults(model, "stages[1]")]
    assert [
        text for text in found if odd in text and "a multiple of 8" in text and "Use strategy ddp" in text
    ]
    assert not [text for text in map(str, replace(split, base="none").faults(model, "x")) if odd in text]
    on_grid = replace(model, layer_bits={odd: 8.0})
    assert not [text for text in map(str, split.faults(on_grid, "x")) if "a multiple of 8" in text]


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
            ["activation_checkpointing", "use lora in place"],
        ),
        ({"finish": "grid"}, ["a grid in force, or a scheme", "neither"]),
        ({"finish": "grid", "scheme": "w4a16-g48", "rounding": "rtn"}, ["48", "q_proj"]),
        ({"scheme": "w8a16"}, ["w8a16 with finish merge", "Set finish to grid"]),
        ({"loftq_rounds": 2, "base": "none"}, ["base none, which rounds nothing", "Use base nf4"]),
        ({"loftq_rounds": 2, "finish": "adapter"}, ["finish adapter", "Use finish merge"]),
        ({"loftq_rounds": 2, "merge_into": "original"}, ["Use merge_into trained"]),
        ({"adapter": "prefix", "finish": "adapter", "alpha": 3}, ["stages[1].alpha", "Leave this field out"]),
        ({"adapter": "prefix", "finish": "adapter", "dropout": 0.5}, ["stages[1].dropout", "adapter prefix"]),
        (
            {"adapter": "bottleneck", "finish": "adapter", "base": "none", "targets": ("q_proj",)},
            ["stages[1].targets", "adapter bottleneck on base none"],
        ),
        (
            {"rounding": "nonsense"},
            ["stages[1].rounding", "finish merge without a scheme", "Leave this field out"],
        ),
        ({"merge_into": "original", "base": "none"}, ["stages[1].merge_into", "nothing beside base none"]),
        (
            {"finish": "grid", "scheme": "w8a16", "rounding": "gtpq"},
            ["stages[1].rounding: expected the name of a quantizer", "gptq"],
        ),
        (
            {"finish": "grid", "scheme": "auto"},
            ["stages[1].scheme: expected one scheme", "quantise in a stage of its own"],
        ),
        ({"finish": "grid", "scheme": "w4a16-g48", "rounding": "rtn"}, ["add these layers to ignore"]),
        (
            {"processes": 2, "strategy": "fsdp", "base": "int8"},
            ["stages[1].strategy", "frozen in int8", "base nf4"],
        ),
        (
            {"processes": 2, "strategy": "deepspeed", "zero_stage": 3, "base": "int8"},
            ["stages[1].strategy", "base nf4"],
        ),
        ({"optimizer": "paged_adamw_8bit"}, ["a GPU for optimizer", "adamw_8bit"]),
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
    assert trained_parameters("lora", 4, dense.anatomy, dense.config, projections(dense)) == rank


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
    # What ends the chain cannot be put before the quantisation.
    beside = said(Qlora(rank=4, finish="adapter"), model)
    assert "Set finish to grid." in beside
    for adapter, finish in (("prefix", "merge"), ("prefix", "adapter"), ("dora", "adapter")):
        found = said(Qlora(rank=4, adapter=adapter, finish=finish, context_length=64), model)
        assert "Use adapter lora with finish grid." in found
        assert "Set finish" not in found
    assert "lora with finish grid, or put this stage before" in said(Qlora(rank=4, adapter="dora"), model)
    assert said(Qlora(rank=4, finish="grid"), model) == ""
    assert "Use adapter lora" in said(Qlora(rank=4, finish="grid", adapter="dora"), model)
    assert "the grid in force is kept" in said(Qlora(rank=4, finish="grid", scheme="w8a16"), model)


def test_a_field_that_only_new_layers_read_is_a_fault_where_all_lie_on_a_grid(
    model: Outlook, dense: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = projections(dense)
    some, every = (replace(model, layer_bits=dict.fromkeys(names, 4.5)) for names in (layers[1:], layers))
    for changes in ({"loftq_rounds": 2}, {"base": "int8"}, {"merge_into": "original"}):
        (name,) = changes
        stage = Qlora(rank=4, finish="grid", **changes)
        assert f"stages[1].{name}: expected nothing beside targets that all lie on a grid" in said(
            stage, every
        )
        assert said(stage, some) == ""
    monkeypatch.setattr(adapters_outlook, "find_spec", lambda name: None if name == "bitsandbytes" else 1)
    assert said(Qlora(rank=4, finish="grid"), every) == ""
    assert "bitsandbytes" in said(Qlora(rank=4, finish="grid"), some)


@pytest.mark.parametrize(
    "changes", [{}, {"base": "none"}, {"adapter": "prefix", "finish": "adapter"}], ids=str
)
def test_the_output_projection_takes_no_adapter(
    model: Outlook, tmp_path: Path, changes: dict[str, Any]
) -> None:
    untied = ModelSource(tiny_llama(tmp_path / "untied", tie_word_embeddings=False))
    model = replace(model, anatomy=untied.anatomy, config=untied.config)
    fields = {"rank": 4, "context_length": 32} | changes
    found = said(Qlora(**fields, ignore=("*.q_proj",)), model)
    assert "before the output projection, got lm_head. Add lm_head to ignore." in found
    assert said(Qlora(**fields), model) == ""


def test_rounded_inputs_are_told_and_fixed_scales_refused(model: Outlook, dense: ModelSource) -> None:
    layers = projections(dense)
    stage = Qlora(rank=4, finish="grid")

    def on(scheme: str) -> Outlook:
        bits, schemes = dict.fromkeys(layers, 8.5), dict.fromkeys(layers, (scheme,))
        return replace(model, layer_bits=bits, layer_schemes=schemes)

    assert f"fixed by calibration in 14 layers, such as {layers[0]}" in said(stage, on("w8a8-static"))
    assert "w8a8 instead of w8a8-static, or put this stage before" in said(stage, on("w8a8-static"))
    # Its input changes with what is trained before it, though its weight stays.
    one = replace(model, layer_bits={layers[-1]: 8.5}, layer_schemes={layers[-1]: ("w8a8-static",)})
    assert "in 1 layers" in said(Qlora(rank=4, ignore=("lm_head", layers[-1])), one)
    for scheme, told in (("w8a8", True), ("w4a8-g32", True), ("fp8", True), ("w8a16", False)):
        assert said(stage, on(scheme)) == ""
        notes = "\n".join(stage.forecast(on(scheme)).notes)
        assert ("while adapters train, no input is rounded" in notes) == told


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
    assert not [w for w in last["result"]["warnings"] if "input is rounded" in w]


def test_adapters_on_weights_whose_inputs_are_rounded_say_so(
    dense: ModelSource, text: str, tmp_path: Path
) -> None:
    stages = [ck.Quantize("rtn", scheme="w8a8"), ck.Qlora(**FIELDS, finish="grid")]
    recipe = ck.Recipe(model=str(dense.directory), data=text, stages=stages)
    said = ck.run(recipe, tmp_path / "out", measures=()).manifest["stages"][-1]["result"]["warnings"]
    assert [w for w in said if w.startswith("14 layers") and "no input is rounded" in w]


def test_a_dora_adapter_beside_a_row_of_zeros_is_refused(
    dense: ModelSource, text: str, tmp_path: Path
) -> None:
    place = tmp_path / "dead"
    place.mkdir()
    tensors = {n: dense.tensor(n).clone() for n in dense.names()}
    layer = projections(dense)[3]
    tensors[f"{layer}.weight"][7] = 0
    write_checkpoint(dense, place, tensors)
    stage = ck.Qlora(**FIELDS, adapter="dora", finish="adapter", base="none")
    recipe = ck.Recipe(model=str(place), data=text, stages=[stage])
    with pytest.raises(PlanError, match=f"{layer}: .*1 rows of zeros, the first of them 7"):
        ck.run(recipe, tmp_path / "out", measures=())
    assert not (tmp_path / "out").exists()


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
