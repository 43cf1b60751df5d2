"""The stage: what it refuses, what it leaves behind, and that conversion changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_in
from tiny import stories, tiny_llama

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.errors import PlanError, SchemeError
from compresskit.formats.checkpoint import export_checkpoint
from compresskit.modeling import ModelSource, open_model
from compresskit.quant.qat import Qat
from compresskit.quant.qat_run import Rounded
from compresskit.stage import Outlook, StageContext, StageResult
from compresskit.training.fields import TrainingFields
from compresskit.training.run import Run

FEW: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "context_length": 24,
    "learning_rate": 1e-2,
    "checkpoint_every": 0,
}
SCHEMES = ("w8a8", "w8a8-static", "w8a16", "w4a16-g32", "w4a16-g32-asym", "w4a8-g32", "w4a8-channel")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(stories())
    return DataSpec(source=str(path))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path_factory.mktemp("model"))))


def outlook(source: ModelSource) -> Outlook:
    return Outlook(
        anatomy=source.anatomy,
        config=source.config,
        tokenizer=source.directory,
        original=source.directory,
        weight_bytes=4.0,
    )


def run(
    stage: Qat, source: ModelSource, text: DataSpec, place: Path, **changes: Any
) -> tuple[StageResult, ModelSource]:
    (place / "out").mkdir(parents=True)
    (place / "scratch").mkdir()
    settings: dict[str, Any] = {"original": source.directory, "cache": place / "cache", "device": "cpu"}
    context = StageContext(out=place / "out", scratch=place / "scratch", data=text, **settings | changes)
    return stage.run(source, context), open_model(str(place / "out"))


@pytest.mark.parametrize(
    ("scheme", "scales"),
    [
        ("w8a8", "dynamic"),
        ("w8a8-static", "learned"),
        ("w4a16-g32-asym", "dynamic"),
        ("w4a16-g32-asym", "fixed"),
        ("w4a16-g32-asym", "learned"),
        ("w4a8-channel", "fixed"),
    ],
)
def test_weights_end_on_the_promised_grids(
    scheme: str, scales: str, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    stage = Qat(scheme=scheme, scales=scales, observer_steps=2, **FEW)
    assert stage.faults(outlook(source), "s") == []
    result, made = run(stage, source, text, tmp_path)
    assert result.metrics["final_loss"] < result.metrics["first_loss"]
    assert result.warnings == ()
    assert {p.layer for p in result.promises} == {n for n in source.anatomy.linears if n != "lm_head"}
    assert [p.broken(made, made) for p in result.promises] == [()] * len(result.promises)
    forecast = stage.forecast(outlook(source))
    bits = {layer.name: layer.bits for layer in result.layers}
    assert {n: bits[n] for n in forecast.after.layer_bits} == pytest.approx(dict(forecast.after.layer_bits))
    for promise in result.promises:
        grid = made.grid(promise.layer)
        assert grid is not None
        assert (grid.activation_scale is not None) == (scheme == "w8a8-static")


LOGITS = """
import json, sys, torch, transformers
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[2]))
for place in sys.argv[3:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    with torch.no_grad():
        torch.save(model(ids).logits, place + "/logits.pt")
"""


def test_the_converted_model_is_the_trained_one(source: ModelSource, tmp_path: Path) -> None:
    """In a new process, with plain transformers; 1e-5 of the logits' largest value, in float32."""
    ids = (torch.arange(40)[None] * 7 + torch.tensor([[0], [3]])) % 256
    rows = [{"input_ids": row, "labels": row, "position_ids": torch.arange(24)} for row in ids[:, :24]] * 4
    fields = TrainingFields(**FEW | {"steps": 6})
    expected: dict[str, torch.Tensor] = {}
    for scheme in SCHEMES:
        out, packed = tmp_path / f"{scheme}-dense", tmp_path / scheme
        out.mkdir()
        packed.mkdir()
        layers = [name for name in source.anatomy.linears if name != "lm_head"]
        adaptation = Rounded(schemes=dict.fromkeys(layers, scheme), scales="learned", observed_passes=3)
        model: Any = adaptation.load(source)

        def save(tensors: Any, adaptation: Rounded = adaptation, out: Path = out) -> None:
            adaptation.save(source, out, tensors)

        Run(model, rows, fields=fields, scratch=tmp_path / f"{scheme}-s", device="cpu", save=save).train()  # type: ignore[arg-type]
        with torch.no_grad():
            expected[scheme] = model.eval()(ids).logits
        export_checkpoint(open_model(str(out)), packed)
    places = [str(tmp_path / scheme) for scheme in SCHEMES]
    command = [sys.executable, "-c", LOGITS, "-", json.dumps(ids.tolist()), *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for scheme, logits in expected.items():
        found = torch.load(tmp_path / scheme / "logits.pt")
        worst = float((found - logits).abs().max() / logits.abs().max())
        assert worst < 1e-5, f"{scheme}: {worst}"


def test_stored_in_bfloat16_it_is_trained_as_it_is_stored(text: DataSpec, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model", dtype=torch.bfloat16)))
    result, made = run(Qat(scheme="w4a16-g32", scales="learned", **FEW), source, text, tmp_path / "s")
    assert made.dtype("model.layers.0.mlp.up_proj.weight") == torch.bfloat16
    assert [p.broken(made, made) for p in result.promises] == [()] * len(result.promises)


def test_held_zeros_and_grids_live_together(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    recipe = ck.Recipe(
        model=str(source.directory),
        data=text,
        stages=[ck.Prune("magnitude", pattern="2:4"), Qat(scheme="w4a8-g32", **FEW)],
    )
    artifact = ck.run(recipe, tmp_path / "out", measures=(), keep_stages=True)
    checks = artifact.manifest["stages"][-1]["checks"]
    assert checks["zeros"] == {"checked": 14, "kept": 14}
    assert checks["grid"] == {"checked": 14, "kept": 14}
    before, after = (open_model(str(artifact.directory / "stages" / name)) for name in ("1-prune", "2-qat"))
    for name in before.names():
        if name.endswith("proj.weight"):
            zeros = before.tensor(name) == 0
            assert not after.tensor(name)[zeros].any()
            assert zeros.float().mean() == 0.5


def test_the_output_projection_learns_on_its_grid_too(text: DataSpec, tmp_path: Path) -> None:
    """Its product with the hidden states is computed by the loss, not by the layer."""
    source = open_model(str(tiny_llama(tmp_path / "model", tie_word_embeddings=False)))
    stage = Qat(scheme="w4a8-channel", ignore=(), **FEW)
    result, made = run(stage, source, text, tmp_path / "s")
    assert made.grid("lm_head") is not None
    plain, _ = run(replace(stage, ignore=("lm_head",)), source, text, tmp_path / "t")
    assert plain.metrics["first_loss"] != result.metrics["first_loss"]


def test_overrides_mean_what_they_mean_for_quantize(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    stage = Qat(scheme="w4a16-g32", overrides={"*.down_proj": "w8a16", "*.q_proj": None}, **FEW)
    result, made = run(stage, source, text, tmp_path)
    bits = {n: g.bits for n in source.anatomy.linears if (g := made.grid(n)) is not None}
    assert {b for n, b in bits.items() if n.endswith("down_proj")} == {8}
    assert not any(n.endswith("q_proj") for n in bits)
    assert {p.layer: p.scheme for p in result.promises}["model.layers.0.mlp.down_proj"] == "w8a16"


def test_a_restart_gives_the_same_bytes(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    """What was observed and what was learned come back; broken off after the second of three checkpoints."""
    stage = Qat(
        scheme="w8a8-static", scales="learned", observer_steps=3, **FEW | {"checkpoint_every": 2, "steps": 6}
    )
    run(stage, source, text, tmp_path / "straight")
    with broken_off_in(step=6):
        run(stage, source, text, tmp_path / "broken")
    (tmp_path / "broken" / "out").rmdir()
    context = StageContext(
        out=tmp_path / "broken" / "out",
        scratch=tmp_path / "broken" / "scratch",
        data=text,
        original=source.directory,
        cache=tmp_path / "broken" / "cache",
        device="cpu",
    )
    context.out.mkdir()
    stage.run(source, context)
    record = json.loads((context.scratch / "record.json").read_text())
    assert record["resumed_from"] == 4
    for name in ("model.safetensors", "grids.safetensors"):
        one, two = ((tmp_path / place / "out" / name).read_bytes() for place in ("straight", "broken"))
        assert one == two, name


def test_faults_come_together(source: ModelSource) -> None:
    stage = Qat(scheme="w4a16-g7", scales="learnt", observer_steps=0, optimizer="muno")
    found = stage.faults(outlook(source), "stages[0]")
    assert {f.where.removeprefix("stages[0].") for f in found} == {
        "optimizer",
        "scales",
        "observer_steps",
        "scheme",
    }
    assert "dynamic or fixed or learned" in str(found)
    for scheme in ("fp8", "nf4", "auto", "fp8_dynamic", "nf4 ", " FP8", "Auto"):
        (fault,) = Qat(scheme=scheme).faults(outlook(source), "s")
        assert fault.where == "s.scheme"
        assert "integer scheme" in fault.cure
    for scheme in ("fp8", "fp8_dynamic", "nf4 "):
        (fault,) = Qat(overrides={"*.q_proj": scheme, "*.k_proj": None}).faults(outlook(source), "s")
        assert fault.where == "s.overrides.*.q_proj"
        assert "integer scheme" in fault.cure


def test_a_layer_that_computes_otherwise_is_told_before(source: ModelSource) -> None:
    linears = dict(source.anatomy.linears)
    name = "model.layers.0.mlp.up_proj"
    linears[name] = replace(linears[name], is_plain=False)
    odd = replace(outlook(source), anatomy=replace(source.anatomy, linears=linears))
    (fault,) = Qat().faults(odd, "s")
    assert (fault.where, fault.got) == ("s.targets", name)
    assert Qat(ignore=(name, "lm_head")).faults(odd, "s") == []


def test_an_option_that_is_wrong_is_named_by_its_own_name(source: ModelSource, text: DataSpec) -> None:
    from click.testing import CliRunner

    from compresskit.cli import main

    words = ["qat", str(source.directory), "--data", text.source, "--override", "*.q_proj=fp8", "--dry-run"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "--override stages[0].overrides.*.q_proj: expected integers, got fp8" in done.output
    assert "--scheme" not in done.output


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (ck.Quantize("rtn", scheme="w8a8"), "layers that are not quantised yet"),
        (ck.Distill(**FEW), "before 1-qat"),
        (ck.Finetune(**FEW), "before 1-qat"),
        (ck.Prune("cut", options={"layers": 1}), "Put the cut first"),
    ],
    ids=["quantize", "distill", "finetune", "cut"],
)
def test_what_may_not_follow_is_refused_with_the_cure(
    after: Any, said: str, source: ModelSource, text: DataSpec
) -> None:
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=[Qat(**FEW), after])
    with pytest.raises(PlanError, match=said):
        ck.plan(recipe)


def test_layers_left_out_may_be_quantised_after(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    stages = [
        Qat(scheme="w8a16", targets=("*mlp*",), **FEW),
        ck.Quantize("rtn", scheme="w8a16", targets=("*attn*",)),
    ]
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=stages)
    artifact = ck.run(recipe, tmp_path / "out", measures=())
    assert artifact.manifest["stages"][-1]["checks"]["grid"] == {"checked": 14, "kept": 14}


def test_a_quantised_model_is_refused_by_the_run_too(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    _, made = run(Qat(**FEW | {"steps": 1}), source, text, tmp_path / "one")
    with pytest.raises(SchemeError, match="not quantised yet"):
        run(Qat(**FEW), made, text, tmp_path / "two")


def test_activation_checkpointing_changes_nothing(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """The second pass through a block observes its inputs once more; that counts, and finds nothing new."""
    stage = Qat(scheme="w8a8-static", observer_steps=2, micro_batch_size=2, **FEW)
    results = [
        run(replace(stage, activation_checkpointing=again), source, text, tmp_path / str(again))
        for again in (False, True)
    ]
    (kept, one), (recomputed, two) = results
    assert recomputed.metrics["final_loss"] == pytest.approx(kept.metrics["final_loss"], rel=1e-6)
    for promise in kept.promises:
        grids = one.grid(promise.layer), two.grid(promise.layer)
        assert grids[0] is not None
        assert grids[1] is not None
        torch.testing.assert_close(grids[0].activation_scale, grids[1].activation_scale, rtol=1e-5, atol=0)


def test_it_learns_from_a_teacher(text: DataSpec, tmp_path: Path) -> None:
    """Of itself before rounding, nothing but the rounding is left to learn; wide weights give it opinions."""
    source = open_model(str(tiny_llama(tmp_path / "wide", initializer_range=0.2)))
    stage = Qat(scheme="w4a8-channel", loss="forward_kl", **FEW | {"steps": 25, "learning_rate": 5e-4})
    assert stage.faults(outlook(source), "s") == []
    result, made = run(stage, source, text, tmp_path / "s")
    assert result.metrics["final_loss"] < 0.9 * result.metrics["first_loss"] < 1
    assert made.grid("model.layers.0.mlp.up_proj") is not None
    plain = replace(stage, loss="cross_entropy")
    taught, alone = (s.forecast(outlook(source)).memory_bytes for s in (stage, plain))
    assert taught - alone == source.bytes


def test_fields_of_a_teacher_need_a_loss_that_listens(source: ModelSource) -> None:
    stage = Qat(teacher=str(source.directory), temperature=2.0)
    where = [f.where for f in stage.faults(outlook(source), "s")]
    assert where == ["s.teacher", "s.temperature"]
    (fault,) = Qat(loss="forward_k").faults(outlook(source), "s")
    assert "forward_kl" in fault.cure


def test_it_survives_the_recipe_file(tmp_path: Path) -> None:
    stage = Qat(scheme="w4a8-g32", overrides={"*.down_proj": "w8a8"}, **FEW)
    recipe = ck.Recipe(model="m", stages=[stage])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert ck.load_recipe(path).stages == (stage,)
    assert asdict(stage)["overrides"] == (("*.down_proj", "w8a8"),)


def test_the_command_makes_the_recipe(source: ModelSource, text: DataSpec) -> None:
    from click.testing import CliRunner

    from compresskit.cli import main

    arguments = ["qat", str(source.directory), "--scheme", "w4a8-g32", "--data", text.source, "--dry-run"]
    done = CliRunner().invoke(main, [*arguments, "--steps", "7", "--override", "*.q_proj=w8a8", "--json"])
    assert done.exit_code == 0, done.output
    stage = Qat(scheme="w4a8-g32", steps=7, overrides={"*.q_proj": "w8a8"})
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=[stage])
    expected = ck.plan(recipe).to_json()["stages"]
    found = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert [{**s, "memory_bytes": 0} for s in found] == [{**s, "memory_bytes": 0} for s in expected]
