"""The loop: promises checked group by group after every stage, nothing half-written, restarts continue."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import compresskit as ck
from compresskit import pipeline
from compresskit.artifact import open_artifact
from compresskit.errors import Fault, OutputError, PlanError, PromiseError
from compresskit.modeling import ModelSource, open_model
from compresskit.modeling.packed import unpacked
from compresskit.pipeline import run
from compresskit.planned import Plan
from compresskit.planner import plan
from compresskit.sparse.promise import Zeros
from compresskit.stage import Forecast, Outlook, StageContext, StageResult
from tests.tiny import tiny_llama

LAYER = "model.layers.0.mlp.up_proj"
RUNS: list[str] = []


class Interrupted(Exception):
    """Stands for a kill: nothing in the pipeline catches it."""


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    return weight * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(weight.shape[1] // 4)


def move_two_zeros(weight: torch.Tensor) -> torch.Tensor:
    """The overall density stays one half; one group of four loses a zero and another gains one."""
    weight = weight.clone()
    weight[3, 9], weight[3, 12] = 1.0, 0.0
    return weight


def die(weight: torch.Tensor) -> torch.Tensor:
    raise Interrupted


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "prune": two_of_four,
    "double": lambda w: 2 * w,
    "break": move_two_zeros,
    "idle": lambda w: w,
    "die": die,
}


@dataclass(frozen=True)
class Edit:
    """A stage that changes one layer by a function of the test's."""

    kind: ClassVar[str] = "edit"
    trains: ClassVar[bool] = False
    reshapes: ClassVar[bool] = False

    name: str

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        return []

    def forecast(self, model: Outlook) -> Forecast:
        return Forecast(after=model, layers=1, memory_bytes=0)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        RUNS.append(self.name)
        shutil.copytree(model.directory, context.out, dirs_exist_ok=True)
        (context.out / "stage.json").unlink(missing_ok=True)
        tensors = load_file(context.out / "model.safetensors")
        tensors[f"{LAYER}.weight"] = CHANGES[self.name](tensors[f"{LAYER}.weight"]).contiguous()
        save_file(tensors, context.out / "model.safetensors", {"format": "pt"})
        return StageResult(
            promises=(half_of_four(),) if self.name == "prune" else (), warnings=("one thing",)
        )


def half_of_four() -> Any:
    return Zeros(layer=LAYER, pattern="2:4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    RUNS.clear()
    (tmp_path / "text.txt").write_text("Some text.\n\nAnd some more.")
    return tiny_llama(tmp_path / "model")


def planned(model: Path, *stages: Any) -> Plan:
    return plan(ck.Recipe(model=str(model), stages=stages, data=str(model.parent / "text.txt")))


def prune() -> Edit:
    return Edit("prune")


def double() -> Edit:
    return Edit("double")


def test_the_artifact_loads_and_its_manifest_tells_the_truth(model: Path, tmp_path: Path) -> None:
    artifact = run(planned(model, prune(), double()), tmp_path / "out")
    weight = ck.load(tmp_path / "out").get_submodule(LAYER).weight
    before = load_file(model / "model.safetensors")[f"{LAYER}.weight"]
    torch.testing.assert_close(weight, 2 * two_of_four(before), rtol=0, atol=0)
    assert [s["name"] for s in artifact.manifest["stages"]] == ["1-edit", "2-edit"]
    assert artifact.manifest["stages"][1]["checks"]["zeros"] == {"checked": 1, "kept": 1}
    assert artifact.manifest["stages"][0]["checks"]["shape"]["checked"] > 0
    assert artifact.manifest["stages"][0]["checks"]["tied"] == {"checked": 1, "kept": 1}
    assert artifact.manifest["warnings"] == ["one thing", "one thing"]
    assert artifact.damaged() == ()
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the artifact"


def test_a_changed_file_is_found(model: Path, tmp_path: Path) -> None:
    artifact = run(planned(model, double()), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text() + " ")
    assert artifact.damaged() == ("config.json",)


def test_a_broken_group_is_found_though_the_density_is_right(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PromiseError, match=rf"2-edit, {LAYER}.*row 3") as caught:
        run(planned(model, prune(), Edit("break")), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_an_artifact_as_the_next_model_keeps_what_it_promised(model: Path, tmp_path: Path) -> None:
    run(planned(model, prune()), tmp_path / "pruned")
    again = run(planned(tmp_path / "pruned", double()), tmp_path / "doubled")
    assert again.manifest["stages"][0]["checks"]["zeros"] == {"checked": 1, "kept": 1}
    third = run(planned(tmp_path / "doubled", double()), tmp_path / "third")
    assert third.manifest["stages"][0]["checks"]["zeros"] == {"checked": 1, "kept": 1}
    with pytest.raises(PromiseError, match="row 3"):
        run(planned(tmp_path / "doubled", Edit("break")), tmp_path / "broken")


def test_a_stage_without_effect_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PromiseError, match="every tensor exactly as before"):
        run(planned(model, Edit("idle")), tmp_path / "out")


def test_a_restart_continues_at_the_first_unfinished_stage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        run(planned(model, prune(), Edit("die")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(CHANGES, "die", lambda w: 3 * w)
    restarted = run(planned(model, prune(), Edit("die")), tmp_path / "out")
    assert RUNS == ["prune", "die", "die"]
    assert restarted.digest == run(planned(model, prune(), Edit("die")), tmp_path / "undisturbed").digest


def test_another_recipe_or_a_changed_model_starts_afresh(model: Path, tmp_path: Path) -> None:
    for change_model in (False, True):
        RUNS.clear()
        with pytest.raises(Interrupted):
            run(planned(model, prune(), Edit("die")), tmp_path / "out", overwrite=True)
        if change_model:
            tiny_llama(model, seed=1)
        run(planned(model, prune(), Edit("double")), tmp_path / "out", overwrite=True)
        assert RUNS == ["prune", "die", "prune", "double"]


def test_the_same_plan_twice_is_done_already(model: Path, tmp_path: Path) -> None:
    stages = [double()]
    first = run(planned(model, *stages), tmp_path / "out")
    again = run(planned(model, *stages), tmp_path / "out")
    assert RUNS == ["double"]
    assert first.digest == again.digest


def test_what_a_kill_leaves_of_the_final_cleanup_is_not_taken_for_finished_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at_once(path: Path, **_: Any) -> None:
        if Path(path).name == "1-edit":
            (Path(path) / "config.json").unlink()
            raise Interrupted
        real(path, **_)

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", killed_at_once)
    with pytest.raises(Interrupted):
        run(planned(model, double()), tmp_path / "out")
    monkeypatch.setattr(shutil, "rmtree", real)
    assert (tmp_path / ".out.work" / "1-edit" / "stage.json").is_file()
    run(planned(model, double()), tmp_path / "out", overwrite=True)
    assert RUNS == ["double", "double"]


def test_a_finished_artifact_without_what_is_now_asked_for_is_not_returned_in_silence(
    model: Path, tmp_path: Path
) -> None:
    run(planned(model, double()), tmp_path / "out")
    with pytest.raises(OutputError, match="without measurements and stages"):
        run(planned(model, double()), tmp_path / "out", measure=lambda c: {}, keep_stages=True)


def test_all_checkpoints_are_measured_together_and_the_records_kept(model: Path, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def measure(checkpoints: Mapping[str, Path]) -> dict[str, Any]:
        calls.append(list(checkpoints))
        return {name: [{"tensors": len(ModelSource(path).names())}] for name, path in checkpoints.items()}

    run(planned(model, prune(), double()), tmp_path / "out", measure=measure, keep_stages=True)
    assert calls == [["0-source", "1-edit", "2-edit"]]
    assert {p.name for p in (tmp_path / "out" / "records").iterdir()} >= {f"{name}.json" for name in calls[0]}
    assert ModelSource(tmp_path / "out" / "stages" / "1-edit").names()


def test_output_that_is_not_ours_or_not_to_be_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="did not write"):
        run(planned(model, double()), tmp_path / "full", overwrite=True)
    run(planned(model, double()), tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        run(planned(model, prune()), tmp_path / "out")
    artifact = run(planned(model, prune()), tmp_path / "out", overwrite=True)
    assert artifact.digest == open_artifact(tmp_path / "out").digest
    with pytest.raises(OutputError, match="parent directory"):
        run(planned(model, double()), tmp_path / "no" / "such" / "place")
    with pytest.raises(OutputError, match=r"a parent directory, got a file\. Choose another place"):
        run(planned(model, double()), tmp_path / "full" / "thesis.txt" / "out")


def test_too_little_disk_is_told_before_anything_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"free disk, got 1 kB"):
        run(planned(model, double()), tmp_path / "out")
    assert RUNS == []
    assert sorted(tmp_path.iterdir()) == before


def test_two_processes_at_one_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_another(weight: torch.Tensor) -> torch.Tensor:
        with pytest.raises(OutputError, match="another compresskit process"):
            run(planned(model, double()), tmp_path / "out")
        return 2 * weight

    monkeypatch.setitem(CHANGES, "double", start_another)
    run(planned(model, double()), tmp_path / "out")


def test_who_comes_while_the_work_is_cleared_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def met(work: Path) -> None:
        with pytest.raises(OutputError, match="another compresskit process"):
            run(planned(model, prune()), tmp_path / "out", overwrite=True)
        refused.append(work)
        real(work)

    refused: list[Path] = []
    real = pipeline._clear
    monkeypatch.setattr(pipeline, "_clear", met)
    run(planned(model, double()), tmp_path / "out")
    assert refused == [tmp_path / ".out.work"] * 2, "of what another plan left, and at the end"
    assert not refused[0].exists()


def test_who_comes_after_the_work_is_cleared_keeps_what_is_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the lock and that of its directory."""

    def met(work: Path) -> None:
        monkeypatch.setattr(Path, "rmdir", real)
        with pytest.raises(Interrupted):
            run(planned(model, double(), Edit("die")), tmp_path / "out", overwrite=True)
        real(work)

    real = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", met)
    run(planned(model, double()), tmp_path / "out")
    monkeypatch.setitem(CHANGES, "die", lambda w: 3 * w)
    run(planned(model, double(), Edit("die")), tmp_path / "out", overwrite=True)
    assert RUNS == ["double", "double", "die", "die"], "its first stage was finished"


def test_a_lock_that_its_owner_has_removed_is_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(lock: Any, how: int) -> None:
        (tmp_path / ".out.work" / "lock").unlink()  # it was opened before
        real(lock, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another compresskit process"):
        run(planned(model, double()), tmp_path / "out")
    assert RUNS == []


def test_cutting_what_was_pruned_or_training_what_is_packed_is_refused(model: Path, tmp_path: Path) -> None:
    run(planned(model, prune()), tmp_path / "pruned")
    with pytest.raises(PlanError, match=r"stages\[0\].*the stages that made this model.*Put the cut first"):
        planned(tmp_path / "pruned", ck.Prune("cut", options={"ffn": 0.5}))
    run(planned(model, ck.Quantize("rtn", scheme="w8a8")), tmp_path / "packed")
    with pytest.raises(PlanError, match=r"model: expected dense weights.*packed"):
        planned(tmp_path / "packed", ck.Prune("magnitude"))


def test_a_teacher_trained_anew_is_another_run(model: Path, tmp_path: Path) -> None:
    teacher = tiny_llama(tmp_path / "teacher", seed=3)
    before = planned(model, ck.Distill(teacher=str(teacher), steps=1, context_length=32)).resume_key
    assert planned(model, ck.Distill(teacher=str(teacher), steps=1, context_length=32)).resume_key == before
    tiny_llama(teacher, seed=4)
    assert planned(model, ck.Distill(teacher=str(teacher), steps=1, context_length=32)).resume_key != before


def test_a_model_that_words_dialogues_in_another_way_is_another_one(model: Path) -> None:
    stage = ck.Finetune(steps=1, context_length=32)
    template = model / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    before = planned(model, stage)
    keys = before.resume_key, before.work_key
    template.write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}")
    after = planned(model, stage)
    assert not {after.resume_key, after.work_key} & {*keys}


def test_processes_are_another_result_only_where_ranks_step_alone(model: Path) -> None:
    def key(processes: int, **fields: Any) -> str:
        stage = ck.Finetune(steps=4, context_length=32, strategy="ddp", processes=processes, **fields)
        return planned(model, stage).work_key

    alone = {"synchronise": "local_sgd", "synchronise_every": 2}
    assert key(2) == key(4)
    assert key(2, **alone) != key(4, **alone)


def test_a_ds_config_that_says_something_else_is_another_plan(model: Path, tmp_path: Path) -> None:
    """Work goes on where only portions are others; ranks of a launch have to read the same."""
    pytest.importorskip("deepspeed")
    place = tmp_path / "ds.json"
    stage = ck.Finetune(steps=1, context_length=32, strategy="deepspeed", deepspeed_config=str(place))

    def keys(config: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
        place.write_text(json.dumps(config))
        made = planned(model, stage)
        return made.resume_key, made.work_key, made.facts

    plain = {"zero_optimization": {"stage": 2}, "prescale_gradients": False}
    done, work, facts = keys(plain)
    assert keys(dict(reversed(plain.items()))) == (done, work, facts)
    other_done, other_work, other_facts = keys({**plain, "prescale_gradients": True})
    assert done != other_done
    assert work != other_work
    name = "file stages[0].deepspeed_config.prescale_gradients"
    assert facts.items() ^ other_facts.items() == {(name, "False"), (name, "True")}
    moved_done, moved_work, _ = keys({**plain, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}})
    assert done != moved_done
    assert work == moved_work


def test_the_resolved_recipe_runs_from_another_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ck.Recipe(model="model", data="text.txt", stages=(double(),))
    assert plan(recipe).recipe.model == str(tmp_path / "model")
    assert plan(recipe).recipe.data.source == str(tmp_path / "text.txt")


def test_all_faults_of_a_recipe_are_told_together(tmp_path: Path) -> None:
    recipe = ck.Recipe(model=str(tmp_path / "absent"), data=str(tmp_path / "none.txt"), stages=(double(),))
    with pytest.raises(PlanError, match=r"absent[\s\S]*none\.txt"):
        plan(recipe)


def test_training_after_quantisation_is_refused_with_the_cure(model: Path) -> None:
    stages = (ck.Quantize("rtn", scheme="w8a8"), ck.Finetune(steps=1))
    with pytest.raises(PlanError, match=r"stages\[1\].*off their grid.*before the quantisation"):
        planned(model, *stages)


def test_exports_stand_beside_and_what_no_target_holds_is_told_before(model: Path, tmp_path: Path) -> None:
    def asked(scheme: str, *targets: str) -> Plan:
        data = str(model.parent / "text.txt")
        stages = (ck.Quantize(scheme=scheme),)
        return plan(ck.Recipe(model=str(model), stages=stages, data=data, export=targets))

    artifact = run(asked("w8a16", "dense", "compressed-tensors"), tmp_path / "out")
    dense = load_file(tmp_path / "out" / "exports" / "dense" / "model.safetensors")
    packed = unpacked(open_model(tmp_path / "out"))
    assert torch.equal(dense[f"{LAYER}.weight"], packed.tensor(f"{LAYER}.weight"))
    assert "exports/dense/model.safetensors" in artifact.manifest["files"]
    with pytest.raises(PlanError) as told:
        asked("w4a16-g16", "bitsandbytes", "gguff")
    assert "export: bitsandbytes: expected nf4" in str(told.value)
    assert "model.layers.0.self_attn.q_proj" in str(told.value)
    assert "Did you mean: gguf?" in str(told.value)
