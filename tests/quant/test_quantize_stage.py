"""The stage: every fault in full, and the run on a real checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec
from compresskit.errors import SchemeError
from compresskit.modeling import ModelSource, load_model, load_tokenizer, open_model
from compresskit.quant import QUANTIZERS
from compresskit.quant.base import Quantized
from compresskit.quant.known import known
from compresskit.quant.outlook import rounded_inputs
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import Scheme, parse
from compresskit.quant.stage import Quantize
from compresskit.stage import Outlook, StageContext, StageResult


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("model")
    return open_model(tiny_llama(place, intermediate_size=44, tie_word_embeddings=False))


def outlook(model: ModelSource) -> Outlook:
    return Outlook(
        anatomy=model.anatomy,
        config=model.config,
        tokenizer=model.directory,
        original=model.directory,
        weight_bytes=4.0,
    )


def run(stage: Quantize, model: ModelSource, place: Path) -> tuple[StageResult, ModelSource]:
    (place / "out").mkdir(parents=True)
    context = StageContext(
        out=place / "out",
        scratch=place / "scratch",
        original=model.directory,
        data=DataSpec(source=str(place / "no-such-data")),
        cache=place / "cache",
    )
    return stage.run(model, context), open_model(place / "out")


def faults(stage: Quantize, model: Outlook) -> str:
    return "\n".join(map(str, stage.faults(model, "stages[1]")))


def test_all_misfits_are_named_together(model: ModelSource) -> None:
    said = faults(Quantize(scheme="w4a16-g32"), outlook(model))
    assert said.count("\n") == 0
    assert said.startswith(
        "stages[1].scheme: expected in_features divisible by the group size 32, got 44 in "
    )
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in said
    assert "w4a16-channel" in said
    assert faults(Quantize(scheme="w4a16-channel"), outlook(model)) == ""


def test_names_options_and_targets(model: ModelSource) -> None:
    look = outlook(model)
    assert "Did you mean: rtn?" in faults(Quantize("rtm"), look)
    said = faults(Quantize(scheme="w8a9", targets=("*.nothing",), options={"bits": 3}), look)
    assert "stages[1].scheme: expected a quantisation scheme, got 'w8a9'. Did you mean: w8a8" in said
    assert "stages[1].targets" in said
    assert "stages[1].bits: expected a field of Quantize or of its method RoundToNearest, got 'bits'" in said


def test_tied_conv1d_and_quantised_layers_are_refused(tmp_path: Path, model: ModelSource) -> None:
    tied = outlook(open_model(tiny_llama(tmp_path)))
    assert "shares its weight with the token embedding. Add lm_head to ignore." in faults(
        Quantize(ignore=()), tied
    )
    name = "model.layers.0.mlp.up_proj"
    again = replace(outlook(model), layer_bits={name: 8.0})
    assert f"got a grid already on {name}. Quantise each layer once" in faults(Quantize(), again)
    linears: Any = {n: replace(ln, transposed=n == name) for n, ln in model.anatomy.linears.items()}
    conv = replace(outlook(model), anatomy=replace(model.anatomy, linears=linears))
    assert f"got Conv1D in {name}" in faults(Quantize(), conv)


def test_forecast(model: ModelSource) -> None:
    stage, before = Quantize(scheme="w8a8"), outlook(model)
    forecast = stage.forecast(before)
    assert forecast.layers == 14
    assert forecast.after.layer_bits["model.layers.0.mlp.down_proj"] == 8 + 32 / 44
    assert forecast.after.checkpoint_bytes < before.checkpoint_bytes
    assert forecast.memory_bytes > 0
    assert "rounded to 8 bits per token" in forecast.notes[0]
    assert not stage.trains
    assert not stage.reshapes


def test_run_reads_no_data_and_keeps_zeros(model: ModelSource, tmp_path: Path) -> None:
    result, after = run(Quantize(scheme="w4a16-channel"), model, tmp_path)
    assert len(result.promises) == len(result.layers) == 14
    assert not [s for p in result.promises for s in p.broken(after, after)]
    assert result.warnings == ()
    assert 0 < result.metrics["weight_relative_error"] < 0.05
    for layer, linear in model.anatomy.linears.items():
        before, now, grid = model.weight_OI(layer), after.weight_OI(layer), after.grid(layer)
        if linear.block is None:
            assert grid is None
            assert torch.equal(before, now)
        else:
            assert grid is not None
            assert not torch.equal(before, now)
            assert torch.equal(grid.snap(now), now)
    untouched = [n for n in model.names() if "norm" in n or "embed" in n]
    assert all(torch.equal(model.tensor(n), after.tensor(n)) for n in untouched)


@dataclass(frozen=True, slots=True)
class ByInputs:
    """Rounds rows of quiet inputs away: without statistics it cannot run."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_sq_mean"})

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats) -> Quantized:
        """Zero the input whose mean square is lowest, then round."""
        sq_mean_I = stats.require_input_sq_mean(weight_OI.shape[1])
        weight_OI = weight_OI.clone()
        weight_OI[:, sq_mean_I.argmin()] = 0
        return RoundToNearest().quantize(weight_OI, scheme, stats)


def test_a_method_that_needs_statistics_gets_them(
    model: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS._table, "by-inputs", f"{__name__}:ByInputs")  # type: ignore[arg-type]
    monkeypatch.delitem(QUANTIZERS.__dict__, "_targets", raising=False)
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little girl who liked to count to ten. " * 60)
    stage = Quantize(
        "by-inputs", scheme="w8a16", data=DataSpec(source=str(text)), samples=3, context_length=32
    )
    look = outlook(model)
    assert faults(stage, look) == ""
    said = faults(replace(stage, samples=0, context_length=4096), look)
    assert "stages[1].samples: expected at least 1, got 0" in said
    assert "stages[1].context_length: expected at most 128, the model's own maximum, got 4096" in said
    assert stage.forecast(look).memory_bytes > Quantize(scheme="w8a16").forecast(look).memory_bytes
    result, after = run(stage, model, tmp_path)
    assert result.metrics["calibration_tokens"] == 3 * 32
    assert all(record.relative_error and record.relative_error < 1 for record in result.layers)
    for record in result.layers:
        assert int((after.weight_OI(record.name) == 0).all(0).sum()) >= 1, record.name
    short, _ = run(replace(stage, samples=1000), model, tmp_path / "short")
    assert "asked for 1000 rows of 32 tokens" in short.warnings[-1]
    with pytest.raises(SchemeError, match="at most 128"):
        run(replace(stage, context_length=4096), model, tmp_path / "long")


def test_run_twice_on_other_layers_keeps_the_first_grids(model: ModelSource, tmp_path: Path) -> None:
    first, middle = run(Quantize(scheme="w8a8", targets=("*.mlp.*",)), model, tmp_path / "1")
    second, after = run(Quantize(scheme="w4a16-g32", targets=("*.self_attn.*",)), middle, tmp_path / "2")
    assert not [s for p in first.promises for s in p.broken(middle, after)]
    assert not [s for p in second.promises for s in p.broken(after, after)]
    with pytest.raises(SchemeError, match="a grid already on"):
        run(Quantize(scheme="w8a16"), after, tmp_path / "3")


def test_same_bytes_twice(model: ModelSource, tmp_path: Path) -> None:
    run(Quantize(scheme="w8a8"), model, tmp_path / "1")
    result, _ = run(Quantize(scheme="w8a8", data="text.txt"), model, tmp_path / "2")
    assert result.warnings == ("rtn reads no data; the data given to it was left unread.",)
    for path in (tmp_path / "1" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "out" / path.name).read_bytes(), path.name


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    words = [f"The {i}th cat sat on the mat and looked at {i * 7} birds. " * 3 for i in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(words))
    return DataSpec(source=str(tmp_path / "text.txt"))


def test_overrides_give_layers_their_own_schemes(model: ModelSource, tmp_path: Path) -> None:
    stage = Quantize(scheme="w4a16-g32", overrides={"*.down_proj": "w8a16", "*.layers.1.self_attn.*": "none"})
    look = outlook(model)
    assert faults(stage, look) == ""
    after = stage.forecast(look).after
    assert after.layer_schemes["model.layers.0.mlp.down_proj"] == ("w8a16",)
    result, made = run(stage, model, tmp_path)
    grids = {n: g for n in made.anatomy.linears if (g := made.grid(n))}
    promised = {p.layer: (p.scheme,) for p in result.promises}  # type: ignore[attr-defined]
    assert promised == after.layer_schemes
    assert grids["model.layers.1.mlp.down_proj"].bits == 8
    assert not any("layers.1.self_attn" in n for n in grids)
    assert {r.name: r.bits for r in result.layers} == pytest.approx(dict(after.layer_bits))


def test_what_no_checkpoint_holds_is_told_before_and_after_an_earlier_stage(model: ModelSource) -> None:
    look = outlook(model)
    assert "bitsandbytes holds no others" in faults(
        Quantize(scheme="w8a8", overrides={"*.q_proj": "nf4"}), look
    )
    later = replace(look, layer_bits={"lm_head": 8.0}, layer_schemes={"lm_head": ("w8a16",)})
    assert "with zero points holds no others" in faults(
        Quantize(scheme="w4a16-g4-asym", targets=("*.q_proj",)), later
    )


def test_a_static_scale_is_the_largest_input_of_calibration(
    model: ModelSource, tmp_path: Path, text: DataSpec
) -> None:
    stage = Quantize(scheme="w8a8-static", data=text, samples=4, context_length=64)
    assert stage.reads_data
    assert not Quantize(scheme="w8a8").reads_data
    _, made = run(stage, model, tmp_path)
    layer = "model.layers.0.self_attn.q_proj"
    grid = made.grid(layer)
    assert grid is not None
    assert grid.activation_scale is not None
    seen = []
    whole = load_model(model)
    hook = whole.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().max())
    )
    for row in range(4):
        inputs = calibration_row(model, text, row, tmp_path)
        with torch.no_grad():
            whole(**inputs)
    hook.remove()
    assert grid.activation_scale.item() == pytest.approx(max(seen).item() * 2 / 255, rel=1e-5)


def calibration_row(model: ModelSource, text: DataSpec, row: int, place: Path) -> dict[str, Tensor]:
    rows = packed(text, load_tokenizer(model), context_length=64, cache=place / "cache", rows=4)
    return {key: rows[row][key][None] for key in ("input_ids", "position_ids")}


def test_auto_meets_its_target_and_tells_what_it_chose(
    model: ModelSource, tmp_path: Path, text: DataSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Quantize(
        scheme="auto",
        target_bits=7.5,
        candidates=("w4a16-channel", "w8a16"),
        data=text,
        samples=2,
        context_length=64,
    )
    look = outlook(model)
    assert faults(stage, look) == ""
    assert "whole model in memory" in stage.forecast(look).notes[0]
    result, made = run(stage, model, tmp_path)
    grids = {n: g for n in made.anatomy.linears if (g := made.grid(n))}
    assert {g.bits for g in grids.values()} == {4, 8}
    assert result.metrics["bits"] <= 7.5
    said = capsys.readouterr().err
    assert f"chosen {result.metrics['chosen']}" in said
    assert said.count("nats per token: ") == len(grids)


def test_nf4_names_the_layers_that_no_cpu_runs(model: ModelSource) -> None:
    pytest.importorskip("bitsandbytes")
    look, targets = outlook(model), ("*.k_proj", "*.q_proj")
    said = faults(Quantize(scheme="nf4", targets=targets), replace(look, anatomy=widened(look)))
    assert "out_features divisible by 32" in said
    assert "model.layers.0.self_attn.k_proj (16), model.layers.1.self_attn.k_proj (16)" in said
    assert "q_proj" not in said
    assert (
        faults(Quantize(scheme="nf4", targets=targets), replace(look, anatomy=widened(look), device="cuda"))
        == ""
    )


def widened(look: Outlook) -> Any:
    """The same anatomy, every layer 64 inputs wide."""
    linears = {name: replace(linear, in_features=64) for name, linear in look.anatomy.linears.items()}
    return replace(look.anatomy, linears=linears)


def test_auto_says_what_it_lacks(model: ModelSource) -> None:
    look = outlook(model)
    assert "target_bits: expected a number of bits, such as 4.5, got None" in faults(
        Quantize(scheme="auto"), look
    )
    assert "expected nothing, unless scheme is auto" in faults(Quantize(scheme="w8a8", target_bits=4.0), look)
    said = faults(Quantize(scheme="auto", target_bits=4.5, candidates=("w4a16-g32", "w4a16-g16")), look)
    assert (
        "expected a candidate that fits each layer, got in_features of model.layers.0.mlp.down_proj" in said
    )
    said = faults(Quantize(scheme="auto", target_bits=4.0, candidates=("w4a16-channel", "w8a16")), look)
    assert "target_bits: expected at most 4 bits, got 4.95 with the smallest scheme of each layer" in said
    said = faults(Quantize(scheme="auto", candidates=("w4a16-g32,w8a16",), target_bits=6.0), look)
    assert said.count("\n") == 0, said


AUTO = Quantize(scheme="auto", target_bits=8.5, candidates=("w4a16-channel", "w8a16"))


@pytest.mark.parametrize(
    ("overrides", "target", "told"),
    [
        ({"*.down_proj": "nf4"}, 8.5, "bitsandbytes holds no others, got nf4, w4a16-channel, w8a16"),
        ({"*.down_proj": "w4a16-g4-asym"}, 8.5, "with zero points holds no others"),
        ({"*.down_proj": "w4a16-g128"}, 8.5, "divisible by the group size 128, got 44 in model.layers.0.mlp"),
        ({"*.down_proj": "w8a16"}, 2.0, "target_bits: expected at most 2 bits"),
        ({"*_proj": "w8a16"}, 8.5, "target_bits: expected at most 8.5 bits, got 8.95"),
    ],
)
def test_auto_looks_at_overrides_before_it_runs(
    model: ModelSource, overrides: dict[str, str], target: float, told: str
) -> None:
    assert told in faults(replace(AUTO, overrides=overrides, target_bits=target), outlook(model))


@pytest.mark.parametrize("earlier", ["nf4", "w4a16-g4-asym"])
def test_auto_looks_at_what_is_quantised_already(model: ModelSource, earlier: str) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    look = replace(outlook(model), layer_bits={layer: 4.5}, layer_schemes={layer: (earlier,)})
    assert "holds no others" in faults(replace(AUTO, targets=("*.v_proj",)), look)


def test_auto_leaves_overridden_layers_to_their_scheme(
    model: ModelSource, tmp_path: Path, text: DataSpec
) -> None:
    # No candidate fits down_proj; w8a8 is none of them.
    stage = replace(
        AUTO,
        candidates=("w4a16-g32", "w4a16-g16"),
        overrides={"*.down_proj": "w8a8"},
        data=text,
        samples=2,
        context_length=64,
    )
    look = outlook(model)
    assert faults(stage, look) == ""
    foreseen = stage.forecast(look).after.layer_schemes
    assert foreseen["model.layers.0.mlp.down_proj"] == ("w8a8",)
    assert set(foreseen["model.layers.0.mlp.up_proj"]) == {"w4a16-g32", "w4a16-g16"}
    result, made = run(stage, model, tmp_path)
    assert not [s for p in result.promises for s in p.broken(made, made)]
    for promise in result.promises:
        assert promise.scheme in foreseen[promise.layer]  # type: ignore[attr-defined]


def test_auto_wants_logits(model: ModelSource) -> None:
    look = outlook(model)
    headless = replace(look, anatomy=replace(look.anatomy, head=None))
    assert "scheme: expected a model with logits" in faults(AUTO, headless)
    assert faults(replace(AUTO, scheme="w8a16", target_bits=None), headless) == ""


def test_a_plan_and_a_run_count_the_bits_of_scales_alike(tmp_path: Path) -> None:
    made = open_model(tiny_llama(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=False))
    look = replace(outlook(made), weight_bytes=made.bytes / made.anatomy.num_parameters)
    assert known(made).scale_bits == known(look).scale_bits == 16
    assert known(replace(look, weight_bytes=2.7)).scale_bits == 16, "a head that is stored twice"
    assert known(made).quantised == known(look).quantised == {}


def test_the_note_says_how_inputs_are_rounded(model: ModelSource) -> None:
    def said(*schemes: str) -> str:
        return " ".join(rounded_inputs(map(parse, schemes)))

    assert said("w8a16", "nf4") == ""
    assert "to 8 bits per token" in said("w8a8", "w4a8")
    assert "e4m3 per token" in said("fp8")
    assert "8 bits, on one scale for each layer" in said("w8a8-static")
    assert "per token" not in said("w8a8-static")
