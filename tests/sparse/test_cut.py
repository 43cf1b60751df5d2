"""Cutting blocks and neurons of many families; the oracle is the whole model with those parts off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_llama
from torch import nn

from compresskit.data.spec import DataSpec
from compresskit.errors import PatternError
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.sparse.coupling import Coupling, find_couplings
from compresskit.sparse.cut import Cut, spaced, strongest
from compresskit.sparse.promise import Zeros
from compresskit.sparse.stage import Prune
from compresskit.stage import Outlook, Promise, StageContext, StageResult

GATED = (("mlp.gate_proj", 1), ("mlp.up_proj", 1))
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[dict[str, Any], str, tuple[tuple[str, int], ...]]] = {
    "LlamaForCausalLM": (GROUPED, "mlp.down_proj", GATED),
    "Qwen2ForCausalLM": ({**GROUPED, "intermediate_size": 32}, "mlp.down_proj", GATED),
    "Qwen3ForCausalLM": (GROUPED, "mlp.down_proj", GATED),
    "MistralForCausalLM": (GROUPED, "mlp.down_proj", GATED),
    "Gemma2ForCausalLM": (GROUPED, "mlp.down_proj", GATED),
    "Gemma3ForCausalLM": (GROUPED, "mlp.down_proj", GATED),
    "Phi3ForCausalLM": (GROUPED, "mlp.down_proj", (("mlp.gate_up_proj", 2),)),
    "GPT2LMHeadModel": (SMALL, "mlp.c_proj", (("mlp.c_fc", 1),)),
    "OPTForCausalLM": ({**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, "fc2", (("fc1", 1),)),
    "BertForSequenceClassification": (SMALL, "output.dense", (("intermediate.dense", 1),)),
    "GPTNeoXForCausalLM": (SMALL, "mlp.dense_4h_to_h", (("mlp.dense_h_to_4h", 1),)),
}


def build(name: str, directory: Path, **changes: Any) -> ModelSource:
    cls: Any = getattr(transformers, name)
    settings = {**FAMILIES[name][0], **changes}
    if name in ("OPTForCausalLM", "GPT2LMHeadModel"):
        settings.pop("intermediate_size")
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings))
    for parameter in model.parameters():  # biases start at zero, which would hide a bias that was cut wrongly
        nn.init.normal_(parameter, 0.02 if parameter.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(directory)
    return open_model(directory)


def run(cut: Prune, model: ModelSource, place: Path, *promises: Promise) -> tuple[StageResult, ModelSource]:
    (place / "out").mkdir(parents=True)
    context = StageContext(
        out=place / "out",
        scratch=place,
        original=model.directory,
        data=DataSpec(source="no-such-data"),
        cache=place,
        promises=promises,
    )
    return cut.run(model, context), open_model(place / "out")


def outlook(model: ModelSource) -> Outlook:
    return Outlook(
        anatomy=model.anatomy,
        config=model.config,
        tokenizer=model.directory,
        original=model.directory,
        weight_bytes=4.0,
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 23).view(2, -1)).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_are_found_in(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    _, down, makers = FAMILIES[name]
    (found,) = find_couplings(model.config, model.anatomy, model.directory)
    assert (found.down, found.makers) == (down, makers)
    assert found.neurons == model.anatomy.linears[f"{model.anatomy.blocks[0]}.{down}"].in_features


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_that_go_are_as_good_as_switched_off(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    result, after = run(Prune("cut", options={"ffn": 0.6}), model, tmp_path)
    (coupling,) = find_couplings(model.config, model.anatomy, model.directory)
    kept = result.metrics["neurons_kept"]
    assert kept % 8 == 0
    assert kept < coupling.neurons
    whole = load_model(model)
    for block in model.anatomy.blocks:
        linear = model.anatomy.linears[f"{block}.{coupling.down}"]
        off = torch.ones(coupling.neurons, dtype=torch.bool)
        off[strongest(model, block, coupling, kept)] = False
        weight: Any = whole.get_submodule(linear.name).weight
        with torch.no_grad():
            weight[off if linear.transposed else (slice(None), off)] = 0
    torch.testing.assert_close(logits(load_model(after)), logits(whole), rtol=1e-4, atol=1e-5)
    assert after.anatomy.num_parameters < model.anatomy.num_parameters
    forecast = Prune("cut", options={"ffn": 0.6}).forecast(outlook(model))
    assert forecast.after.anatomy.parameter_shapes == after.anatomy.parameter_shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_go_are_as_good_as_taken_out(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    result, after = run(Prune("cut", options={"layers": 2}), model, tmp_path)
    assert result.metrics["blocks_kept"] == [0, 3]
    assert len(after.anatomy.blocks) == 2
    whole = load_model(model)
    blocks: Any = whole.get_submodule(model.anatomy.blocks[0].rpartition(".")[0])
    kinds = getattr(whole.config, "layer_types", None)
    del blocks[1:3]
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    whole.config.num_hidden_layers = 2
    if kinds:
        whole.config.layer_types = [kinds[0], kinds[3]]
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


def test_the_strongest_neurons_are_the_slow_loop(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    block = model.anatomy.blocks[1]
    score = []
    for j in range(40):
        parts = [
            model.weight_OI(f"{block}.mlp.gate_proj")[j],
            model.weight_OI(f"{block}.mlp.up_proj")[j],
            model.weight_OI(f"{block}.mlp.down_proj")[:, j],
        ]
        score.append(sum(float(w) ** 2 for part in parts for w in part))
    want = sorted(sorted(range(40), key=lambda j: -score[j])[:16])
    assert strongest(model, block, Coupling("mlp.down_proj", GATED, 40), 16).tolist() == want


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


def test_faults(tmp_path: Path) -> None:
    model = outlook(build("LlamaForCausalLM", tmp_path))

    def said(**options: Any) -> str:
        return "\n".join(map(str, Prune("cut", options=options).faults(model, "stages[0]")))

    assert said(layers=2, ffn=0.5) == ""
    assert said() == (
        "stages[0]: expected layers or ffn, got neither. Say how many layers to keep, or ffn: 0.5."
    )
    assert said(layers=4, ffn=1.5) == (
        "stages[0].layers: expected 1 to 3 of 4, got 4. Give how many layers to keep.\n"
        "stages[0].ffn: expected a number between 0 and 1, got 1.5. "
        "Give the fraction of neurons to keep, such as 0.5."
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


def test_the_forecast_keeps_what_a_cut_does_not_change(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path))
    data = DataSpec(source="a.txt")
    before = replace(outlook(model), device="cuda", devices=4, data=data, layer_bits={"lm_head": 8.0})
    after = Cut(layers=1).forecast(before).after
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
