"""Compensation: what goes is as good as always being what it is on average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresskit.data.spec import DataSpec
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured import cut
from compresskit.stage import StageContext
from tests.sparse.structured.zoo import FAMILIES, build, follows, kept_by, logits, outlook

ROWS = [{"input_ids": torch.arange(3 + 5 * n, 3 + 5 * n + length)} for n, length in enumerate((7, 12, 7))]
LEARNT = {"LlamaForCausalLM": ["attention_bias", "mlp_bias"], "GPT2LMHeadModel": [], "OPTForCausalLM": []}


def compensated(
    model: ModelSource, place: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, ModelSource]:
    monkeypatch.setattr(cut, "calibration_rows", lambda *_, **__: (ROWS, None, ()))
    (place / "out").mkdir()
    context = StageContext(
        out=place / "out", scratch=place, original=model.directory, data=DataSpec(), cache=place, device="cpu"
    )
    stage = Prune("cut", options={"compensate": True, **options})
    assert stage.faults(outlook(model), "s") == []
    forecast = stage.forecast(outlook(model))
    result, after = stage.run(model, context), open_model(place / "out")
    assert forecast.after.anatomy.parameter_shapes == after.anatomy.parameter_shapes
    assert result.metrics["calibration_tokens"] == 26
    assert result.metrics["parameters_kept"] == after.anatomy.num_parameters
    return forecast, after


def stand_by_means(whole: nn.Module, model: ModelSource, reader: str, keep_LN: Tensor) -> None:
    """Let ``reader`` of each block read its mean over ROWS where ``keep_LN`` is False."""
    seen: dict[str, list[Tensor]] = {}
    layers = [f"{block}.{reader}" for block in model.anatomy.blocks]
    hooks = []
    for name in layers:

        def note(_: nn.Module, args: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].flatten(0, -2))

        hooks.append(whole.get_submodule(name).register_forward_pre_hook(note))
    with torch.no_grad():
        for row in ROWS:
            whole(row["input_ids"][None])
    for hook in hooks:
        hook.remove()
    for name, keep_N in zip(layers, keep_LN, strict=True):
        mean_N = torch.cat(seen[name]).mean(0)

        def replace(_: nn.Module, args: Any, keep_N: Tensor = keep_N, mean_N: Tensor = mean_N) -> Any:
            return (torch.where(keep_N, args[0], mean_N),)

        whole.get_submodule(name).register_forward_pre_hook(replace)


@pytest.mark.parametrize("name", LEARNT)
def test_neurons_that_go_are_their_mean(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, tmp_path / "model")
    forecast, after = compensated(model, tmp_path, monkeypatch, ffn=0.6)
    whole = load_model(model)
    stand_by_means(whole, model, FAMILIES[name][1], kept_by(model, ffn=0.6).units["ffn"])
    torch.testing.assert_close(logits(load_model(after)), logits(whole), rtol=1e-4, atol=1e-5)
    on = [key for key in LEARNT[name] if key == "mlp_bias"]
    config = json.loads((after.directory / "config.json").read_text())
    assert [key for key in ("attention_bias", "mlp_bias") if config.get(key)] == on
    assert [note for note in forecast.notes if "is on" in note] == [
        f"{k} is on: layers get biases." for k in on
    ]


def test_heads_that_go_are_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "LlamaForCausalLM"
    model = build(name, tmp_path / "model")
    _, after = compensated(model, tmp_path, monkeypatch, heads=0.5, ffn=0.6)
    whole, kept = load_model(model), kept_by(model, heads=0.5, ffn=0.6).units
    # Both means are those of the whole model, whatever goes elsewhere: neurons are replaced by theirs last.
    runs = kept["heads"].repeat_interleave(32, 1)
    measured = load_model(model)
    stand_by_means(measured, model, "self_attn.o_proj", runs)
    stand_by_means(whole, model, "mlp.down_proj", kept["ffn"])
    for block in model.anatomy.blocks:
        theirs: Any = measured.get_submodule(f"{block}.self_attn.o_proj")
        ours: Any = whole.get_submodule(f"{block}.self_attn.o_proj")
        ours._forward_pre_hooks.update(theirs._forward_pre_hooks)
    torch.testing.assert_close(logits(load_model(after)), logits(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_all_widths_at_once_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, tmp_path / "model")
    options: dict[str, Any] = {"ffn": 0.6, "hidden": 0.5, "layers": 2, "importance": "fluctuation"}
    _, after = compensated(model, tmp_path, monkeypatch, **options)
    whole = load_model(after)
    assert whole.num_parameters() == after.anatomy.num_parameters
    assert bool(after.config.to_dict().get("mlp_bias")) == (not follows(name))
    kept = kept_by(model, ROWS, **options)
    uncut, reader = load_model(model), FAMILIES[name][1]
    for new, old in enumerate(kept.blocks):
        layer: Any = whole.get_submodule(f"{after.anatomy.blocks[new]}.{reader}")
        before: Any = uncut.get_submodule(f"{model.anatomy.blocks[old]}.{reader}")
        means = mean_inputs(uncut, f"{model.anatomy.blocks[old]}.{reader}")
        gone = ~kept.units["ffn"][old]
        shift = before.weight[:, gone] @ means[gone] + (0 if before.bias is None else before.bias)
        torch.testing.assert_close(layer.bias, shift[kept.units["hidden"]], rtol=1e-4, atol=1e-5)


def mean_inputs(whole: nn.Module, name: str) -> Tensor:
    """What the layer called ``name`` reads on average over ROWS."""
    seen: list[Tensor] = []
    hook = whole.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for row in ROWS:
            whole(row["input_ids"][None])
    hook.remove()
    return torch.cat(seen).mean(0)


def test_only_what_parameters_cuts_gets_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("LlamaForCausalLM", tmp_path / "model", intermediate_size=256)
    forecast, after = compensated(model, tmp_path, monkeypatch, parameters=0.63, multiple=64)
    assert (after.config.mlp_bias, after.config.attention_bias) == (True, False)
    assert after.anatomy.num_parameters == pytest.approx(0.63 * model.anatomy.num_parameters, rel=0.05)
    assert [note for note in forecast.notes if "is on" in note] == ["mlp_bias is on: layers get biases."]


def test_compensation_that_has_no_place_is_refused(tmp_path: Path) -> None:
    def said(name: str, **options: Any) -> str:
        model = outlook(build(name, tmp_path / f"{name}{len(options)}"))
        return "\n".join(map(str, Prune("cut", options={"compensate": True, **options}).faults(model, "s")))

    assert said("MistralForCausalLM", ffn=0.5) == (
        "s.compensate: expected a bias on mlp.down_proj, which reads ffn, "
        "got none, and no switch of the configuration that gives it one. Leave compensate out."
    )
    assert "a bias on self_attn.o_proj, which reads heads" in said("Qwen2ForCausalLM", heads=0.5)
    assert "s.compensate: expected neurons or heads that are cut" in said("LlamaForCausalLM", layers=2)
    assert "s.compensate: expected neurons or heads" in said("LlamaForCausalLM", hidden=0.5, layers=2)
