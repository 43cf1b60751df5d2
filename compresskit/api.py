"""The verbs of the Python face; the command line calls the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.artifact import EXPORT, RECORDS, Artifact, check_output, publish, write_json
from compresskit.data import open_corpus
from compresskit.data.spec import STDLIB, DataSpec
from compresskit.errors import DataError, Fault, InputError, OutputError
from compresskit.foresight.forecast import foresee
from compresskit.modeling import load_model, load_tokenizer, open_model
from compresskit.pipeline import run as run_plan
from compresskit.planned import Plan
from compresskit.planner import plan
from compresskit.recipe import Recipe
from compresskit.registry import nearest
from compresskit.stage import Json, Stage
from compresskit.training.adapters.attach import with_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from compresskit.measure import Record
    from compresskit.reports import Report

MEASURES = ("size", "quality", "latency", "memory")
DEFAULT_MEASURES = ("size", "quality")
LATENCY: Mapping[str, int] = {"rounds": 3, "repetitions": 3, "warmup": 1}


def run(
    recipe: Recipe | Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    keep_stages: bool = False,
    measures: Sequence[str] = DEFAULT_MEASURES,
    documents: int | None = 200,
) -> Artifact:
    """Plan and run a recipe, measuring the model before the first and after every stage.

    Args:
        recipe: what to do, or its plan.
        out: directory to write.
        overwrite: replace an artifact of another run.
        keep_stages: leave each stage's checkpoint in ``out/stages``.
        measures: any of ``size``, ``quality``, ``latency``, ``memory``; empty measures nothing.
        documents: of the evaluation data, at most so many.

    Returns:
        The artifact; its measurements are in ``out/records``.

    Raises:
        InputError: something is wrong with what was asked; nothing was written.
        RunError: a stage had to stop; the same call continues after the last finished work.
    """
    planned = recipe if isinstance(recipe, Plan) else plan(recipe)
    _check_measures(measures, documents)
    if "quality" in measures and planned.source.anatomy.is_causal:
        _require_text(_evaluation(planned.recipe))

    def measure(checkpoints: Mapping[str, Path]) -> dict[str, Json]:
        records = compare(
            checkpoints, data=_evaluation(planned.recipe), measures=measures, documents=documents
        )
        return {name: [r.to_json() for r in records if r.subject == name] for name in checkpoints}

    return run_plan(
        planned, out, overwrite=overwrite, keep_stages=keep_stages, measure=measure if measures else None
    )


def _evaluation(recipe: Recipe) -> DataSpec:
    """What quality is measured on: all of the evaluation data, else the validation split of the data."""
    return recipe.evaluation or replace(recipe.data, split="validation")


def compare(
    checkpoints: Mapping[str, Path],
    *,
    data: DataSpec,
    measures: Sequence[str],
    documents: int | None,
) -> list[Record]:
    """Measure several checkpoints as their users load them; their latency in turn, A B A B.

    Args:
        checkpoints: name -> Hugging Face directory.
        data: for quality.
        measures: any of :data:`MEASURES`.
        documents: of ``data``, at most so many.

    Returns:
        One record for each checkpoint and measure.
    """
    from compresskit.measure import compare_latency
    from compresskit.measure import measure as measure_one

    alone = tuple(m for m in measures if m != "latency")
    records = []
    for name, directory in checkpoints.items():
        records += measure_one(directory, data=data, what=alone, max_documents=documents, subject=name)
    if "latency" in measures:
        records += compare_latency(checkpoints, **LATENCY)
    return records


def bench(
    *directories: str | Path,
    data: DataSpec | str = STDLIB,
    measures: Sequence[str] = MEASURES,
    documents: int | None = 200,
) -> list[Record]:
    """Measure checkpoints as their users load them: with plain transformers, in fresh processes.

    Args:
        directories: any Hugging Face directories.
        data: for quality; of ``stdlib:`` the validation split.
        measures: any of ``size``, ``quality``, ``latency``, ``memory``.
        documents: of ``data``, at most so many.

    Returns:
        One record for each directory and measure, named after the directory.
    """
    _check_measures(measures, documents)
    spec = DataSpec(source=data) if isinstance(data, str) else data
    if spec.source == STDLIB:
        spec = replace(spec, split="validation")
    names = [Path(d).resolve().name for d in directories]
    repeated = any(names.count(name) > 1 for name in names)
    checkpoints = {str(d) if repeated else n: Path(d) for d, n in zip(directories, names, strict=True)}
    return compare(checkpoints, data=spec, measures=measures, documents=documents)


def report(*subjects: Artifact | str | Path) -> Report:
    """Build the report of one or more artifacts or record files; measures nothing."""
    from compresskit.reports import build

    return build([s.directory if isinstance(s, Artifact) else Path(s) for s in subjects])


def export(
    directory: str | Path,
    *,
    to: str,
    out: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Write the model in ``directory`` as another runtime loads it.

    Args:
        directory: a checkpoint: dense, a stage's with its grids, or a finished artifact.
        to: ``gguf``, ``onnx``, ``torchao``, ``compressed-tensors``, ``bitsandbytes``, ``bitmask``, ``dense``
            or another name of ``compresskit.exports.EXPORTS``.
        out: directory to write; it appears whole or not at all.
        overwrite: replace an export or an artifact there; never one that holds ``directory`` itself.
        trust_remote_code: whether code in ``directory`` may run.

    Returns:
        Sentences about what the target holds only nearly, such as scales rounded to float16.

    Raises:
        OutputError: ``out`` is taken, or holds what is not ours, or ``directory`` itself.
        FormatError: the target cannot hold the model; every layer, package or architecture at fault is named.
    """
    from compresskit.exports.run import export_model

    out = Path(out).absolute()
    check_output(out, overwrite=overwrite)
    source = open_model(directory, trust_remote_code=trust_remote_code)
    if source.directory.resolve().is_relative_to(out.resolve()):
        cure = "Choose another output directory."
        raise OutputError(Fault(str(out), "a directory apart from the model's", "one that holds it", cure))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        partial = Path(place) / "export"
        partial.mkdir()
        warnings = export_model(source, to, partial)
        write_json(partial / EXPORT, {"to": to, "warnings": list(warnings)})
        publish(partial, out)
    return warnings


def load(
    directory: str | Path, *, dtype: str = "auto", device: str = "cpu", layout: str = "", resident: str = ""
) -> nn.Module:
    """The model in ``directory``, whole, ready to run; any Hugging Face directory will do.

    With a trained adapter beside it, it comes as peft's model of the two. The packed layers of a bitmask
    directory are timed on ``device``, and multiply by the layout that is fastest there, dense among them.

    Args:
        directory: of the model.
        dtype: ``auto`` is what the configuration says, else what is stored.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        layout: of a bitmask directory: a name of ``compresskit.kernels.packed.LAYOUTS`` for every packed
            layer, whatever is faster; empty times them, or takes what ``COMPRESSKIT_LAYOUT`` says.
        resident: of a bitmask directory: ``fastest`` keeps dense weights too where these win in larger
            batches; ``packed`` keeps only packed ones. Empty is ``COMPRESSKIT_RESIDENT``, else ``fastest`` if
            there is room for both.

    Raises:
        ModelError: it cannot be loaded.
        FormatError: packed weights contradict themselves.
        InputError: no such device, layout or policy.
    """
    packed = {"layout": layout, "resident": resident}
    model: nn.Module = with_adapter(
        load_model(directory, dtype=dtype, device=device, packed=packed), Path(directory)
    )
    return model


def compress(
    model: nn.Module,
    stages: Iterable[Stage],
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSpec | str = "stdlib:",
    seed: int = 0,
    out: str | Path | None = None,
) -> Artifact | None:
    """Run ``stages`` on a live transformers model, in place.

    The model takes the same road as one on disk, by way of a temporary directory; each parameter of
    ``model`` then holds the result. A quantised weight holds the values on its grid; activations stay as
    they are, so load the artifact to run those quantised too.

    Args:
        model: a ``PreTrainedModel`` with its weights.
        stages: as in a recipe; none may change shapes unless ``out`` is given.
        tokenizer: of the model.
        data: for calibration and training.
        seed: of the run.
        out: keep the artifact here; then ``model`` is left alone.

    Returns:
        The artifact when ``out`` was given.

    Raises:
        InputError: a stage changes shapes and there is no ``out`` to put the result.
    """
    with tempfile.TemporaryDirectory(prefix="compresskit-") as place:
        start = Path(place) / "model"
        model.save_pretrained(start)  # type: ignore[operator]
        tokenizer.save_pretrained(start)
        source = DataSpec(source=data) if isinstance(data, str) else data
        recipe = Recipe(model=str(start), stages=tuple(stages), data=source, seed=seed)
        planned = plan(recipe)
        if out is not None:
            return run(planned, out, measures=())
        if any(stage.reshapes for stage in planned.stages):
            raise InputError(
                Fault("stages", "stages that keep every shape", "a cut", "Give out=DIRECTORY and load that.")
            )
        _copy_weights(run(planned, Path(place) / "result", measures=(), keep_stages=True), planned, model)
    return None


def _copy_weights(artifact: Artifact, planned: Plan, model: nn.Module) -> None:
    last = open_model(artifact.directory / "stages" / planned.stages[-1].name)
    parameters = dict(model.named_parameters())
    for name in last.names():
        if name in parameters:
            parameters[name].data.copy_(last.tensor(name))


def _check_measures(measures: Sequence[str], documents: int | None) -> None:
    faults = []
    if unknown := sorted(set(measures) - set(MEASURES)):
        cure = f"Did you mean: {nearest(unknown[0], MEASURES)}?"
        faults.append(Fault("measures", f"any of {', '.join(MEASURES)}", ", ".join(unknown), cure))
    if documents is not None and documents < 1:
        faults.append(Fault("documents to score", "at least 1", str(documents), "Raise it."))
    if faults:
        raise InputError(*faults)


def _require_text(spec: DataSpec) -> None:
    """Raise DataError, before any work is done, unless there is something to score quality on."""
    if next(open_corpus(spec).documents(spec.split), None) is None:
        raise DataError(
            Fault(
                f"evaluation: {spec.source}",
                "at least one document to score quality on",
                f"none in its {spec.split} part",
                "Name evaluation data of its own, or measure no quality (--measure size).",
            )
        )


__all__ = [
    "RECORDS",
    "bench",
    "compress",
    "export",
    "foresee",
    "load",
    "load_tokenizer",
    "plan",
    "report",
    "run",
]
