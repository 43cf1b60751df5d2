"""Cutting models of many families; the oracle is the whole model with those parts off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_llama

from compresskit.data.spec import DataSpec
from compresskit.errors import PatternError
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.sparse.promise import Zeros
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured import coupling
from compresskit.sparse.structured.coupling import find_couplings
from compresskit.sparse.structured.cut import Cut
from compresskit.sparse.structured.surgery import spaced
from compresskit.stage import Outlook
from tests.sparse.structured.zoo import (
    FAMILIES,
    GROUPED,
    build,
    follows,
    kept_by,
    logits,
    outlook,
    run,
    switch_off_channels,
    switch_off_inputs,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_found_in(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    settings, reader, makers, attention, _ = FAMILIES[name]
    found = find_couplings(model.config, model.anatomy, model.directory)
    ((ffn,), (heads,)) = found.ffn, found.heads
    assert (ffn.reader, tuple(ffn.makers)) == (reader, makers)
    assert ffn.units == model.anatomy.linears[f"{model.anatomy.blocks[0]}.{reader}"].in_features
    assert heads.reader == attention
    assert heads.units == settings.get("num_key_value_heads", 4)
    assert sum(map(len, heads.makers.values())) > heads.units * heads.size


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_that_go_are_as_good_as_switched_off(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    stage = Prune("cut", options={"ffn": 0.6})
    result, after = run(stage, model, tmp_path)
    kept = kept_by(model, ffn=0.6).units["ffn"]
    count = result.metrics["units_kept"]["ffn"]
    assert count % 8 == 0
    assert count < result.metrics["units_before"]["ffn"]
    assert kept.sum(1).tolist() == [count] * 4
    whole = load_model(model)
    switch_off_inputs(whole, model, FAMILIES[name][1], kept)
    torch.testing.assert_close(logits(load_model(after)), logits(whole), rtol=1e-4, atol=1e-5)
    check_sizes(stage, model, after)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not follows(name)])
def test_heads_that_go_are_as_good_as_switched_off(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    stage = Prune("cut", options={"heads": 2})
    _, after = run(stage, model, tmp_path)
    whole, attention = load_model(model), FAMILIES[name][3]
    inputs = model.anatomy.linears[f"{model.anatomy.blocks[0]}.{attention}"].in_features
    kept = kept_by(model, heads=2).units["heads"].repeat_interleave(inputs // 2, 1)
    switch_off_inputs(whole, model, attention, kept)
    torch.testing.assert_close(logits(load_model(after)), logits(whole), rtol=1e-4, atol=1e-5)
    check_sizes(stage, model, after)
    config = json.loads((after.directory / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["head_dim"] == inputs // 4


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_that_go_are_as_good_as_never_written(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    stage = Prune("cut", options={"hidden": 0.5})
    result, after = run(stage, model, tmp_path)
    whole, small = load_model(model), load_model(after)
    kept, (_, _, _, attention, writers) = kept_by(model, hidden=0.5).units, FAMILIES[name]
    assert int(kept["hidden"].sum()) == 16
    switch_off_channels(whole, small, writers, kept["hidden"])
    assert ("heads" in result.metrics["units_kept"]) == follows(name)
    if follows(name):
        assert result.metrics["units_kept"]["heads"] == 2
        switch_off_inputs(whole, model, attention, kept["heads"].repeat_interleave(8, 1))
    torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-5)
    check_sizes(stage, model, after)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_at_once_loads_and_is_as_foreseen(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    options = {"layers": 2, "ffn": 0.5, "hidden": 16} | ({} if follows(name) else {"heads": 0.5})
    stage = Prune("cut", options=options)
    assert stage.faults(outlook(model), "stages[0]") == []
    result, after = run(stage, model, tmp_path)
    check_sizes(stage, model, after)
    forecast = stage.forecast(outlook(model))
    assert forecast.layers == len({layer.name for layer in result.layers})
    assert len(after.anatomy.blocks) == 2
    whole, small = load_model(model), load_model(after)
    kept, (_, reader, _, attention, writers) = kept_by(model, **options).units, FAMILIES[name]
    blocks: Any = whole.get_submodule(model.anatomy.blocks[0].rpartition(".")[0])
    switch_off_inputs(whole, model, reader, kept["ffn"])
    inputs = model.anatomy.linears[f"{model.anatomy.blocks[0]}.{attention}"].in_features
    runs = kept["heads"].repeat_interleave(inputs // kept["heads"].shape[1], 1)
    switch_off_inputs(whole, model, attention, runs)
    drop_middle_blocks(whole, blocks)
    switch_off_channels(whole, small, writers, kept["hidden"])
    torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == result.metrics["parameters_kept"]
    bare = transformers.AutoModel.from_pretrained(after.directory)
    known, prefix = small.state_dict(), f"{small.base_model_prefix}."
    for key, tensor in bare.state_dict().items():
        assert "pooler" in key or torch.equal(tensor, known[f"{prefix}{key}"]), key


def check_sizes(stage: Prune, model: ModelSource, after: ModelSource) -> None:
    """What was foreseen is what was written, and what plain transformers loads."""
    forecast = stage.forecast(outlook(model)).after
    assert forecast.anatomy.parameter_shapes == after.anatomy.parameter_shapes
    assert forecast.anatomy.num_parameters == after.anatomy.num_parameters < model.anatomy.num_parameters
    cls: Any = getattr(transformers, model.config.architectures[0])
    whole, told = cls.from_pretrained(after.directory, output_loading_info=True)
    assert not any(told.values())
    assert whole.num_parameters() == after.anatomy.num_parameters


def drop_middle_blocks(whole: Any, blocks: Any) -> None:
    """Of four blocks leave the first and the last."""
    del blocks[1:3]
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    whole.config.num_hidden_layers = 2
    if kinds := getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [kinds[0], kinds[3]]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_go_are_as_good_as_taken_out(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    result, after = run(Prune("cut", options={"layers": 2}), model, tmp_path)
    assert result.metrics["blocks_kept"] == [0, 3]
    assert len(after.anatomy.blocks) == 2
    whole = load_model(model)
    blocks: Any = whole.get_submodule(model.anatomy.blocks[0].rpartition(".")[0])
    kinds = getattr(whole.config, "layer_types", None)
    drop_middle_blocks(whole, blocks)
    if kinds:
        assert list(after.config.layer_types) == [kinds[0], kinds[3]]
    torch.testing.assert_close(logits(load_model(after)), logits(whole), rtol=1e-5, atol=1e-6)


def test_both_at_once_and_config_tells_the_truth(tmp_path: Path) -> None:
    model = build("Gemma3ForCausalLM", tmp_path / "model", num_hidden_layers=11)
    stage = Prune("cut", options={"layers": 3, "ffn": 0.5})
    assert stage.faults(outlook(model), "stages[0]") == []
    _, after = run(stage, model, tmp_path)
    config = json.loads((after.directory / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 24)
    was = model.config.layer_types
    assert config["layer_types"] == [was[0], was[5], was[10]] != list(was[:3])
    assert load_model(after).num_parameters() == after.anatomy.num_parameters
    name = "model.layers.2.self_attn.q_proj"
    assert torch.equal(after.weight_OI(name), model.weight_OI("model.layers.10.self_attn.q_proj"))
    assert stage.forecast(outlook(model)).after.anatomy.num_parameters == after.anatomy.num_parameters


def test_keys_that_go_by_another_name_in_the_file_are_not_left_beside(tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", tmp_path / "model")
    path = model.directory / "config.json"
    config = json.loads(path.read_text())
    for ours, theirs in (("n_embd", "hidden_size"), ("n_head", "num_attention_heads")):
        config[theirs] = config.pop(ours)
    path.write_text(json.dumps(config))
    _, after = run(Prune("cut", options={"hidden": 0.5}), open_model(model.directory), tmp_path)
    written = json.loads((after.directory / "config.json").read_text())
    assert (written["n_embd"], written["n_head"]) == (16, 2)
    assert not {"hidden_size", "num_attention_heads"} & written.keys()


@pytest.mark.parametrize(
    ("count", "keep", "want"), [(5, 3, [0, 2, 4]), (6, 2, [0, 5]), (12, 6, [0, 2, 4, 7, 9, 11]), (4, 1, [0])]
)
def test_spaced(count: int, keep: int, want: list[int]) -> None:
    assert list(spaced(count, keep)) == want


@pytest.mark.parametrize("count", range(2, 40))
def test_spaced_never_repeats_and_keeps_both_ends(count: int) -> None:
    for keep in range(2, count + 1):
        got = spaced(count, keep)
        assert (len(set(got)), got[0], got[-1]) == (keep, 0, count - 1)


def test_bfloat16_in_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("LlamaForCausalLM", tmp_path / "float32")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    monkeypatch.setattr("compresskit.sparse.structured.cut.SHARD_BYTES", 1 << 13)
    model = open_model(tmp_path / "model")
    options = {"layers": 2, "ffn": 0.6, "heads": 0.5, "hidden": 0.5}
    _, after = run(Prune("cut", options=options), model, tmp_path)
    assert len(list(after.directory.glob("*.safetensors"))) > 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(after.directory)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    kept = kept_by(model, **options).units
    for new, old in enumerate((0, 3)):
        theirs, ours = half.model.layers[old], plain.model.layers[new]
        neurons, channels = kept["ffn"][old], kept["hidden"]
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[channels][:, neurons])
        rows = kept["heads"][old].repeat_interleave(32)
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[rows][:, channels])
    assert torch.equal(plain.lm_head.weight, half.lm_head.weight[:, kept["hidden"]])


def test_layers_of_a_model_without_blocks(tmp_path: Path) -> None:
    model = outlook(build("LlamaForCausalLM", tmp_path))
    (fault,) = Cut(layers=1).faults(replace(model, anatomy=replace(model.anatomy, blocks=())), "s")
    assert str(fault) == (
        "s.layers: expected a model with blocks to spare, got none. Leave layers out, or cut another model."
    )


def test_faults(tmp_path: Path) -> None:
    model = outlook(build("LlamaForCausalLM", tmp_path))

    def said(**options: Any) -> str:
        return "\n".join(map(str, Prune("cut", options=options).faults(model, "stages[0]")))

    assert said(layers=2, ffn=0.5) == ""
    assert said() == (
        "stages[0]: expected layers, ffn, heads, hidden, parameters or milliseconds, got none of them. "
        "Say how many layers to keep, or parameters: 0.5."
    )
    assert said(layers=4, ffn=1.5) == (
        "stages[0].layers: expected 1 to 3 of 4, got 4. Give how many layers to keep.\n"
        "stages[0].ffn: expected a number between 0 and 1, got 1.5. "
        "Give the fraction to keep, such as 0.5."
    )
    assert "Cut, got 'layer'. Did you mean: layers?" in said(layer=2)
    assert "stages[0].layers: expected a whole number or null, got '2'" in said(layers="2")
    assert "stages[0].ffn: expected fewer than 40 neurons after rounding" in said(ffn=0.99)


def test_a_model_whose_neurons_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=2)
    config.architectures = ["MixtralForCausalLM"]
    model = Outlook(
        anatomy=anatomy_of(skeleton_of(config, tmp_path)),
        config=config,
        tokenizer=tmp_path,
        original=tmp_path,
        weight_bytes=4.0,
    )
    (fault,) = Cut(ffn=0.5).faults(model, "stages[0]")
    assert str(fault).startswith("stages[0].ffn: expected one linear layer in each block")
    assert "got no layer that reads neurons. Cut layers only, or another model." in str(fault)
    assert Cut(layers=2).faults(model, "stages[0]") == []


def test_experts_share_memory_in_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "LARGE", 1000)
    config = transformers.MixtralConfig(**{**GROUPED, "num_hidden_layers": 1}, num_local_experts=4)
    config.architectures = ["MixtralForCausalLM"]
    probe = coupling._probe(config, tmp_path, False)
    experts = [p for n, p in probe.named_parameters() if p.dim() == 3]
    assert experts
    assert [p.untyped_storage().nbytes() for p in experts] == [p.numel() for p in experts], "a fourth"
    found = coupling.couplings_of_one(config, tmp_path)
    assert [(heads.units, heads.size) for heads in found.heads] == [(2, 32)]


def test_the_forecast_keeps_what_a_cut_does_not_change(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path))
    data = DataSpec(source="a.txt")
    before = replace(outlook(model), device="cuda", devices=4, data=data, layer_bits={"lm_head": 8.0})
    after = Prune("cut", options={"layers": 1}).forecast(before).after
    assert len(after.anatomy.blocks) == after.config.num_hidden_layers == 1
    same = replace(before, anatomy=after.anatomy, config=after.config, layer_bits={})
    assert after == same


def test_earlier_zeros_and_grids_are_not_broken_silently(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path / "model"))
    promise = Zeros(layer="model.layers.0.mlp.up_proj", pattern="2:4")
    with pytest.raises(PatternError, match=r"got earlier promises of zeros\. Put the cut first"):
        run(Prune("cut", options={"layers": 1}), model, tmp_path, promise)


def test_same_bytes_twice(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path / "model"))
    stage = Prune("cut", options={"layers": 1, "ffn": 0.5})
    run(stage, model, tmp_path / "1")
    run(stage, model, tmp_path / "2")
    assert (tmp_path / "1" / "out" / "tokenizer.json").is_file()
    for path in (tmp_path / "1" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "out" / path.name).read_bytes(), path.name
