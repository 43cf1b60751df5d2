"""The last step of a run: the artifact as readers will see it, packed, checked, exported and published."""

from __future__ import annotations

import shutil
from pathlib import Path

from compresskit.artifact import (
    RECIPE,
    RECORDS,
    STAGES,
    inherited_promises,
    publish,
    seal,
    sha256_of,
)
from compresskit.exports.run import export_model
from compresskit.formats import export
from compresskit.modeling import ModelSource
from compresskit.modeling.streaming import return_memory
from compresskit.planned import Plan
from compresskit.stage import Json, promise_to_json

EXPORTED = "exports"
STATE = "stage.json"
KEY = "plan.json"


def assemble(
    plan: Plan, model: ModelSource, states: list[dict[str, Json]], work: Path, out: Path, keep_stages: bool
) -> None:
    """Encode the last checkpoint, check it once more as a reader will see it, and publish."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return_memory()  # of the last stage, before tensors as large as the embeddings are read
    packed = export(model, partial)
    said = _export_all(plan, model, partial)
    (partial / STATE).unlink(missing_ok=True)
    (partial / RECIPE).write_text(plan.recipe.to_yaml(), encoding="utf-8")
    manifest = manifest_of(plan, states)
    manifest["warnings"] += said
    seal(partial, {**manifest, "parameters_read_back": packed})
    (work / RECORDS).mkdir(exist_ok=True)
    shutil.copytree(work / RECORDS, partial / RECORDS)
    shutil.copyfile(work / KEY, partial / RECORDS / KEY)
    _keep_timings(plan, work, partial / RECORDS)
    if keep_stages:
        for stage in plan.stages:
            shutil.copytree(work / stage.name, partial / STAGES / stage.name)
    publish(partial, out)


def _export_all(plan: Plan, model: ModelSource, partial: Path) -> list[str]:
    """Write every target that the recipe asks for beside the artifact's own form; what changed in them."""
    said = []
    for target in plan.recipe.export:
        place = partial / EXPORTED / target
        place.mkdir(parents=True)
        said += [f"{EXPORTED}/{target}: {text}" for text in export_model(model, target, place)]
    return said


def _keep_timings(plan: Plan, work: Path, records: Path) -> None:
    for stage in plan.stages:
        scratch = work / f"{stage.name}.scratch"
        for name in ("seconds.json", "record.json", "losses.jsonl", "overlap.json", "trace-0.json"):
            if (scratch / name).is_file():
                target = records / f"{stage.name}.{name}"
                shutil.copyfile(scratch / name, target)


def manifest_of(plan: Plan, states: list[dict[str, Json]]) -> dict[str, Json]:
    """Everything about a run that is the same whenever it is repeated."""
    return {
        "format": 1,
        "plan": plan.digest,
        "recipe": plan.recipe.to_json(),
        "source": {p.name: sha256_of(p) for p in sorted(plan.source.directory.glob("*.safetensors"))},
        "data": plan.data_fingerprints,
        "teachers": {
            name: {p.name: sha256_of(p) for p in sorted(path.glob("*.safetensors"))}
            for name, path in plan.teachers.items()
        },
        "versions": plan.versions,
        "inherited": [promise_to_json(p) for p in inherited_promises(plan.source.directory)],
        "stages": states,
        "warnings": [w for state in states for w in state["result"]["warnings"]],
    }
