"""The stage: every fault in full, and the run on a real checkpoint."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from compresskit.data.spec import DataSpec
from compresskit.errors import DataError, PatternError
from compresskit.formats.grid import same_grid
from compresskit.modeling import ModelSource, open_model
from compresskit.quant.stage import Quantize
from compresskit.recipe import load_recipe
from compresskit.sparse.stage import Prune
from compresskit.stage import Outlook, Stage, StageContext, StageResult

TEXT = "Once upon a time there was a little girl who liked to count to ten. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """An odd feed-forward width: 2:4 fits 44, 4:8 does not."""
    return open_model(tiny_llama(tmp_path_factory.mktemp("model"), intermediate_size=44))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT * 60)
    return path


def outlook(model: ModelSource) -> Outlook:
    return Outlook(
        anatomy=model.anatomy,
        config=model.config,
        tokenizer=model.directory,
        original=model.directory,
        weight_bytes=4.0,
    )


def run(
    stage: Stage, model: ModelSource, place: Path, data: Path | None = None
) -> tuple[StageResult, ModelSource]:
    (place / "out").mkdir(parents=True)
    context = StageContext(
        out=place / "out",
        scratch=place / "scratch",
        original=model.directory,
        data=DataSpec(source=str(data or place / "no-such-data")),
        cache=place / "cache",
    )
    return stage.run(model, context), open_model(place / "out")


def faults(stage: Prune, model: ModelSource) -> str:
    return "\n".join(map(str, stage.faults(outlook(model), "stages[0]")))


def test_a_stage_is_a_value() -> None:
    stage = Prune("cut", options={"layers": 3, "ffn": 0.5}, targets="*.mlp.*", data="a.txt")  # type: ignore[arg-type]
    assert stage == Prune(
        "cut", options={"ffn": 0.5, "layers": 3}, targets=("*.mlp.*",), data=DataSpec(source="a.txt")
    )
    assert stage.options == (("ffn", 0.5), ("layers", 3))
    assert hash(stage) == hash(Prune("cut", options=stage.options, targets=["*.mlp.*"], data=stage.data))  # type: ignore[arg-type]
    assert stage.reshapes
    assert not Prune().reshapes
    assert not stage.trains


def test_a_fraction_may_be_a_number(tmp_path: Path) -> None:
    assert Prune(pattern=0.5) == Prune(pattern="0.5")
    assert Prune(pattern=0.5).pattern == "0.5"
    path = tmp_path / "recipe.yaml"
    for written in ("0.5", "'0.5'"):
        path.write_text(f"model: m\nstages:\n  - prune: {{method: magnitude, pattern: {written}}}\n")
        assert load_recipe(path).stages == (Prune("magnitude", pattern="0.5"),)


def test_a_row_needs_a_length_only_where_rows_are_read(model: ModelSource) -> None:
    config = deepcopy(model.config)
    config.max_position_embeddings = 0  # states nothing; its type lets no null in
    endless = replace(outlook(model), config=config)
    (fault,) = Prune("wanda").faults(endless, "stages[0]")
    assert str(fault).startswith(
        "stages[0].context_length: expected the tokens of a calibration row, got none"
    )
    assert Prune("wanda", context_length=9999).faults(endless, "stages[0]") == []
    assert Prune("magnitude").faults(endless, "stages[0]") == []
    assert Prune("magnitude", context_length=9999).faults(outlook(model), "stages[0]") == []


def test_every_layer_that_does_not_fit_is_named(model: ModelSource) -> None:
    assert faults(Prune(pattern="2:4"), model) == ""
    said = faults(Prune(pattern="4:8"), model)
    assert said.startswith("stages[0].pattern: expected in_features divisible by 8, got 44 in ")
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj." in said
    assert said.endswith("add these layers to ignore, or set on_indivisible to skip or pad.")
    assert faults(Prune(pattern="4:8", on_indivisible="pad"), model) == ""
    assert faults(Prune(pattern="4:8", on_indivisible="skip"), model) == ""
    none = Prune(pattern="4:8", on_indivisible="skip", targets=("*.down_proj",))
    said = faults(none, model)
    assert "divisible by 8" in said, "skipping all of them is no way out"
    assert said.endswith("add these layers to ignore, or set on_indivisible to pad.")


def test_every_layer_that_blocks_do_not_fit_is_named(model: ModelSource) -> None:
    assert faults(Prune(pattern="50%:4x4"), model) == ""
    said = faults(Prune(pattern="50%:8x16"), model).splitlines()
    assert [line.partition(" in model")[0] for line in said] == [
        "stages[0].pattern: expected out_features divisible by 8, got 44 x 32",
        "stages[0].pattern: expected in_features divisible by 16, got 32 x 44",
    ]
    assert "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, " in said[0]
    assert faults(Prune(pattern="50%:8x16", on_indivisible="pad"), model) == ""
    assert faults(Prune(pattern="50%:8x16", on_indivisible="skip"), model) == ""


def test_what_padding_does_not_mend(model: ModelSource) -> None:
    """Groups that keep more than a layer has, blocks of which there is one, and rows that are too narrow."""
    padded = Prune(pattern="40:64", on_indivisible="pad")
    said = faults(padded, model)
    assert said.startswith("stages[0].pattern: expected more than 40 in_features, got 32 in model.layers.0.")
    assert said.endswith("Choose another pattern, or add these layers to ignore.")
    assert "set on_indivisible" not in faults(replace(padded, on_indivisible="error"), model)
    assert "expected so many blocks that" in faults(replace(padded, pattern="50%:64x64"), model)
    narrow = faults(Prune(pattern="1.2%"), model)
    assert narrow.endswith("or set on_indivisible to skip."), "nothing to pad"
    assert "rounds to a zero" in faults(Prune(pattern="1.2%", on_indivisible="pad"), model)


def test_padding_is_not_part_of_a_pattern_that_is_asked_for(model: ModelSource) -> None:
    for stage in (Prune(pattern="4:8:pad"), Prune(pattern="4:8:PAD", on_indivisible="pad")):
        said = faults(stage, model)
        assert said.startswith("stages[0].pattern: expected 4:8, got '4:8:")
        assert said.endswith("Write 4:8, and set on_indivisible to pad: only layers that need it are padded.")


def test_what_a_cut_has_no_use_for_is_refused(model: ModelSource) -> None:
    given = {
        "pattern": "2:4",
        "allocation": "owl",
        "recover": "reconstruct",
        "targets": ("*.mlp.*",),
        "ignore": ("*.0.*",),
        "true_sequential": True,
        "on_indivisible": "skip",
    }
    said = faults(Prune("cut", options={"layers": 1}, **given), model).splitlines()  # type: ignore[arg-type]
    assert [line.split(":")[0] for line in said] == [f"stages[0].{name}" for name in (
        "pattern", "allocation", "recover", "targets", "ignore", "true_sequential", "on_indivisible"
    )]  # fmt: skip
    assert "expected nothing, with method cut, which zeroes no weights, got reconstruct" in said[2]
    assert faults(Prune("cut", options={"layers": 1}), model) == ""


def test_names_options_numbers_and_targets(model: ModelSource) -> None:
    assert "Did you mean: wanda?" in faults(Prune("wnada"), model)
    stage = Prune(
        pattern="2;4", targets=("*.q_porj",), options={"dampening": 1}, samples=0, on_indivisible="skp"
    )
    said = faults(stage, model)
    assert "stages[0].pattern: expected a pattern such as 50%" in said
    assert "got '2;4'" in said
    assert "q_proj" in said
    assert "stages[0].dampening: expected a field of Prune or of its method Wanda" in said
    assert "stages[0].samples: expected at least 1, got 0" in said
    assert "stages[0].on_indivisible: expected error, skip or pad, got 'skp'. Did you mean: skip?" in said
    assert len(said.splitlines()) == 5
    assert "Add lm_head to ignore" in faults(Prune(ignore=()), model)


def test_forecast(model: ModelSource) -> None:
    wanda, magnitude = Prune("wanda").forecast(outlook(model)), Prune("magnitude").forecast(outlook(model))
    assert wanda.layers == 14
    assert wanda.memory_bytes > magnitude.memory_bytes > 0
    assert wanda.after == outlook(model)
    assert wanda.notes == ()
    skipped = Prune(pattern="4:8", on_indivisible="skip").forecast(outlook(model))
    assert skipped.layers == 12
    assert skipped.notes[0].startswith("4:8 does not fit 2 layers, which stay dense: model.layers.0.mlp.down")
    padded = Prune(pattern="4:8", on_indivisible="pad").forecast(outlook(model))
    assert padded.layers == 14
    assert padded.notes[0].startswith("4:8 does not fit 2 layers, which are padded with zeros: model.layers.")


def test_magnitude_reads_no_data(model: ModelSource, tmp_path: Path) -> None:
    result, after = run(Prune("magnitude", pattern="2:4"), model, tmp_path)
    assert len(result.promises) == len(result.layers) == 14
    assert not [s for p in result.promises for s in p.broken(after, after)]
    assert [layer.zero_fraction for layer in result.layers] == [0.5] * 14
    assert result.layers[0].relative_error is None
    assert result.metrics == {"zero_fraction": 0.5, "calibration_tokens": 0}
    assert result.warnings == ()
    for layer in model.anatomy.linears:
        before, now = model.weight_OI(layer), after.weight_OI(layer)
        assert torch.equal(now, before) == (layer == "lm_head")
        assert torch.equal(now[now != 0], before[now != 0])


def test_wanda_measures_and_says_what_was_short(model: ModelSource, text: Path, tmp_path: Path) -> None:
    stage = Prune("wanda", pattern="2:4", samples=1000, context_length=64)
    result, after = run(stage, model, tmp_path, text)
    assert not [s for p in result.promises for s in p.broken(after, after)]
    assert all(layer.relative_error and 0 < layer.relative_error < 1 for layer in result.layers)
    assert "asked for 1000 rows of 64 tokens" in result.warnings[-1]
    assert result.metrics["calibration_tokens"] > 1000
    other, _ = run(Prune("magnitude", pattern="2:4"), model, tmp_path / "magnitude")
    assert other.metrics["zero_fraction"] == 0.5
    magnitude = open_model(tmp_path / "magnitude" / "out")
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(magnitude.weight_OI(name), after.weight_OI(name))


def test_wanda_without_data_is_an_error(model: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-such-data"):
        run(Prune("wanda"), model, tmp_path)


def test_context_length_beyond_the_model(model: ModelSource, text: Path, tmp_path: Path) -> None:
    stage = Prune("wanda", context_length=4096)
    assert "at most 128, the model's own maximum, got 4096" in faults(stage, model)
    with pytest.raises(PatternError, match="at most 128"):
        run(stage, model, tmp_path, text)


def test_skipped_layers_are_told(model: ModelSource, tmp_path: Path) -> None:
    stage = Prune("magnitude", pattern="4:8", on_indivisible="skip", data="text.txt")  # type: ignore[arg-type]
    result, after = run(stage, model, tmp_path)
    assert len(result.layers) == 12
    assert result.warnings == (
        "4:8 does not fit 2 layers, which stay dense: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj.",
        "magnitude reads no data; the data given to it was left unread.",
    )
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(model.weight_OI(name), after.weight_OI(name))
    with pytest.raises(PatternError, match="divisible by 8"):
        run(Prune("magnitude", pattern="4:8"), model, tmp_path / "error")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_padded_layers_are_told_and_promised(
    method: str, model: ModelSource, text: Path, tmp_path: Path
) -> None:
    """Of 44 inputs 4:8 makes five groups with four zeros and one of four inputs with none."""
    stage = Prune(method, pattern="4:8", on_indivisible="pad", samples=4, context_length=32)
    result, after = run(stage, model, tmp_path, text)
    odd = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert f"4:8 does not fit 2 layers, which are padded with zeros: {', '.join(odd)}." in result.warnings
    assert {p.layer: p.pattern for p in result.promises} == {  # type: ignore[attr-defined]
        layer.name: "4:8:pad" if layer.name in odd else "4:8" for layer in result.layers
    }
    assert not [s for p in result.promises for s in p.broken(after, after)]
    for name in odd:
        zero = after.weight_OI(name) == 0
        assert (zero.sum(1) == 20).all()
        assert not zero[:, 40:].any()
    assert {r.zero_fraction for r in result.layers if r.name in odd} == {20 / 44}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_blocks_go_whole(method: str, model: ModelSource, text: Path, tmp_path: Path) -> None:
    stage = Prune(method, pattern="50%:8x16", on_indivisible="pad", samples=4, context_length=32)
    result, after = run(stage, model, tmp_path, text)
    assert not [s for p in result.promises for s in p.broken(after, after)]
    assert {p.pattern for p in result.promises} == {"50%:8x16", "50%:8x16:pad"}  # type: ignore[attr-defined]
    for layer in result.layers:
        zero = after.weight_OI(layer.name) == 0
        rows, columns = zero.shape
        blocks = [zero[o : o + 8, i : i + 16] for o in range(0, rows, 8) for i in range(0, columns, 16)]
        assert all(block.all() or not block.any() for block in blocks), layer.name
        assert sum(bool(block.all()) for block in blocks) == round(len(blocks) / 2)


def test_a_quantised_layer_keeps_its_grid(model: ModelSource, tmp_path: Path) -> None:
    first, middle = run(Quantize(scheme="w4a16-channel"), model, tmp_path / "1")
    result, after = run(Prune("magnitude", pattern="2:4"), middle, tmp_path / "2")
    assert not [s for p in first.promises for s in p.broken(middle, after)]
    assert not [s for p in result.promises for s in p.broken(after, after)]
    name = "model.layers.1.self_attn.q_proj"
    assert same_grid(middle.grid(name), after.grid(name))
    assert result.layers[0].bits == 4 + 32 / 32


def test_zeros_survive_quantisation_and_a_second_pruning(model: ModelSource, tmp_path: Path) -> None:
    first, middle = run(Prune("magnitude", pattern="2:4"), model, tmp_path / "1")
    second, after = run(Quantize(scheme="w8a8"), middle, tmp_path / "2")
    third, last = run(Prune("magnitude", pattern="70%"), after, tmp_path / "3")
    for promise in first.promises:
        assert promise.broken(middle, after) == ()
        assert promise.broken(middle, last) == ()
    assert not [s for p in second.promises for s in p.broken(after, last)]
    assert not [s for p in third.promises for s in p.broken(last, last)]


def test_same_bytes_twice(model: ModelSource, text: Path, tmp_path: Path) -> None:
    stage = Prune("wanda", pattern="50%", samples=4, context_length=32)
    assert run(stage, model, tmp_path / "1", text)[0] == run(stage, model, tmp_path / "2", text)[0]
    for path in (tmp_path / "1" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "out" / path.name).read_bytes(), path.name


def test_of_many_layers_that_do_not_fit_ten_are_named(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path, num_hidden_layers=12, intermediate_size=44))
    (said,) = Prune(pattern="4:8", on_indivisible="pad").uneven(model)
    assert said.startswith("4:8 does not fit 12 layers, which are padded with zeros: model.layers.0.mlp.down")
    assert said.endswith("model.layers.9.mlp.down_proj and 2 more.")
