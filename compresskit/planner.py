"""A recipe against a model's skeleton and this machine: faults, bytes, memory. No weight is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from compresskit.artifact import inherited_promises
from compresskit.data import check, open_corpus
from compresskit.data.spec import DataSpec
from compresskit.data.wording import foresee
from compresskit.errors import Fault, InputError, OutputError, PlanError
from compresskit.exports import EXPORTS, runtimes_of
from compresskit.exports.base import Prospect, adapter_fault
from compresskit.formats.checkpoint import ADAPTER
from compresskit.modeling import ModelSource, load_tokenizer, open_model, resolve_device
from compresskit.modeling.packed import packed_fault
from compresskit.modeling.skeleton import resolve_dtype
from compresskit.progress import size
from compresskit.quant.scheme import parse
from compresskit.recipe import Recipe, resolved
from compresskit.sparse.chain import moving_faults, promised_layers, zeroed_layers
from compresskit.sparse.worth import with_worth
from compresskit.stage import Forecast, Json, Outlook, Stage

PACKAGES = (
    "compresskit",
    "torch",
    "transformers",
    "compressed-tensors",
    "accelerate",
    "tokenizers",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "torchao",
    "gguf",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
DISK_MARGIN_BYTES = 64 << 20
EARLIER = "the stages that made this model"
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage in its place in the chain, what it will do, and the layers whose zeros it will promise."""

    index: int
    stage: Stage
    before: Outlook
    forecast: Forecast
    zeroed: tuple[str, ...]

    @property
    def name(self) -> str:
        """``2-distill``: the name of its checkpoint, its records and its row in reports."""
        return f"{self.index}-{self.stage.kind}"

    @property
    def trains(self) -> bool:
        """Whether several processes may take part."""
        return self.stage.trains

    @property
    def reshapes(self) -> bool:
        """Whether tensors change their shapes."""
        return self.stage.reshapes


@dataclass(frozen=True)
class Plan:
    """A recipe that can run here, and what it will do; print it to read it."""

    recipe: Recipe
    source: ModelSource
    stages: tuple[PlannedStage, ...]
    cache: Path
    interpreter_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def versions(self) -> dict[str, str]:
        """Of Python and every installed package whose code shapes the result."""
        found = {"python": platform.python_version()}
        for name in PACKAGES:
            with suppress(PackageNotFoundError):
                found[name] = version(name)
        return found

    @property
    def teachers(self) -> dict[str, Path]:
        """Directories of the teachers that stages name, by the field that names them."""
        named = {f"stages[{s.index - 1}].teacher": getattr(s.stage, "teacher", None) for s in self.stages}
        return {where: Path(path) for where, path in named.items() if path and Path(path).is_dir()}

    @property
    def source_fingerprint(self) -> str:
        """SHA-256 over names, types and shapes of the model's tensors and over its configuration."""
        model = self.source
        shapes = [(name, str(model.dtype(name)), list(model.shape(name))) for name in model.names()]
        return _digest([shapes, json.loads((model.directory / "config.json").read_text(encoding="utf-8"))])

    @property
    def digest(self) -> str:
        """The same for the same recipe, model shapes and versions; stands in the manifest."""
        return _digest([self.recipe.to_json(), self.source_fingerprint, self.versions])

    @cached_property
    def data_fingerprints(self) -> dict[str, str]:
        """Of the text of every data source, by the field that names it; reads the sources."""
        return {where: open_corpus(spec).fingerprint() for where, spec in data_of(self.recipe)}

    @property
    def resume_key(self) -> str:
        """:attr:`digest`, the data, the state of the source's files: a restart continues where all agree."""
        directories = [self.source.directory, *self.teachers.values()]
        files = [f for d in directories for f in sorted(d.iterdir()) if f.suffix in MODEL_SUFFIXES]
        states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return _digest([self.digest, self.data_fingerprints, states])

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of one process over the whole chain, libraries included."""
        return self.interpreter_bytes + max((s.forecast.memory_bytes for s in self.stages), default=0)

    @property
    def disk_bytes(self) -> int:
        """Needed while the chain runs: checkpoints of stages and of training, the artifact, its exports."""
        need = 0
        for stage in self.stages:
            after = stage.forecast.after
            dense = round(after.anatomy.num_parameters * after.weight_bytes)
            need += dense + (2 * 12 * after.anatomy.num_parameters if stage.trains else 0)
            need += stage.forecast.scratch_bytes
            if stage is self.stages[-1]:
                widths = [max(EXPORTS[to].least_bytes, after.weight_bytes) for to in self.recipe.export]
                need += dense + round(after.anatomy.num_parameters * sum(widths))
        return need + DISK_MARGIN_BYTES

    def check_disk(self, place: Path) -> None:
        """Raise OutputError unless the disk under ``place`` holds what the chain writes."""
        free = shutil.disk_usage(place).free
        if free < self.disk_bytes:
            raise OutputError(
                Fault(
                    str(place.parent),
                    f"{size(self.disk_bytes)} of free disk",
                    f"{size(free)}",
                    "Free some, or choose another output directory.",
                )
            )

    def to_json(self) -> dict[str, Json]:
        """The plan as plain data."""
        return {
            "model": self.recipe.model,
            "parameters": self.source.anatomy.num_parameters,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "notes": list(self.notes),
            "stages": [
                {
                    "name": s.name,
                    "layers": s.forecast.layers,
                    "bytes_before": s.before.checkpoint_bytes,
                    "bytes_after": s.forecast.after.checkpoint_bytes,
                    "memory_bytes": self.interpreter_bytes + s.forecast.memory_bytes,
                    "notes": list(s.forecast.notes),
                }
                for s in self.stages
            ],
        }

    def __str__(self) -> str:
        anatomy = self.source.anatomy
        head = (
            f"{self.recipe.model}: {anatomy.num_parameters:,} parameters, {len(anatomy.blocks)} blocks, "
            f"{len(anatomy.linears)} linear layers\n"
        )
        row = "{:<14} {:<26} {:>6} {:>10} {:>10} {:>12}"
        lines = [row.format("stage", "what", "layers", "before", "after", "peak memory")]
        notes = list(self.notes)
        for s in self.stages:
            lines.append(
                row.format(
                    s.name,
                    summary(s.stage)[:26],
                    s.forecast.layers,
                    size(s.before.checkpoint_bytes),
                    size(s.forecast.after.checkpoint_bytes),
                    size(self.interpreter_bytes + s.forecast.memory_bytes),
                )
            )
            notes += [f"{s.name}: {note}" for note in s.forecast.notes]
        lines.append(f"disk while running: {size(self.disk_bytes)}")
        return "\n".join([head, *lines, *notes])


def plan(recipe: Recipe, *, cache: Path | None = None, build_dir: Path | None = None) -> Plan:
    """Check ``recipe`` against its model, its data and this machine.

    Args:
        recipe: what to do.
        cache: of tokens; None is ``~/.cache/compresskit`` or ``COMPRESSKIT_CACHE``.
        build_dir: where a model given as a config.json is built; None is under ``cache``.

    Returns:
        The plan; printing it shows bytes before and after and the estimated peak memory.

    Raises:
        InputError: every fault that can be known now, all of them together.
    """
    cache = cache or Path(os.environ.get("COMPRESSKIT_CACHE", "~/.cache/compresskit")).expanduser()
    recipe = resolved(recipe)
    faults = _data_faults(recipe)
    try:
        source, outlook = _opened(recipe, build_dir or cache / "built")
    except InputError as error:
        raise PlanError(*error.faults, *(_placed(fault, recipe) for fault in faults)) from error
    unworded, notes = _wordings(recipe, source, faults)
    faults += unworded + _source_faults(source, recipe)
    stages: list[PlannedStage] = []
    for index, stage in enumerate(recipe.stages):
        where = f"stages[{index}]"
        found = stage.faults(outlook, where)
        layers = () if found else zeroed_layers(stage, outlook)
        found += _chain_faults(stage, layers, stages, source, where)
        faults += found
        if found:
            continue
        forecast = stage.forecast(outlook)
        stages.append(PlannedStage(index + 1, stage, outlook, forecast, layers))
        outlook = forecast.after
    if len(stages) == len(recipe.stages):
        faults += _export_faults(recipe, outlook)
    if faults:
        raise PlanError(*(_placed(fault, recipe) for fault in faults))
    told = with_worth(stages, outlook, runtimes_of(recipe.export))
    return Plan(recipe, source, told, cache, psutil.Process().memory_info().rss, notes)


def _opened(recipe: Recipe, build_dir: Path) -> tuple[ModelSource, Outlook]:
    """The model's structure, and what the first stage will be given."""
    resolve_dtype(recipe.dtype)
    device = resolve_device(recipe.device).type
    source = open_model(
        recipe.model,
        tokenizer=recipe.tokenizer,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        build_dir=build_dir,
        seed=recipe.seed,
    )
    outlook = Outlook(
        anatomy=source.anatomy,
        config=source.config,
        tokenizer=source.directory,
        original=source.directory,
        weight_bytes=source.bytes / max(source.anatomy.num_parameters, 1),
        data=recipe.data,
        device=device,
        devices=torch.cuda.device_count(),
        trust_remote_code=recipe.trust_remote_code,
    )
    return source, outlook


def _source_faults(source: ModelSource, recipe: Recipe) -> list[Fault]:
    """What forbids any stage on this model."""
    if recipe.stages and (source.directory / ADAPTER).is_dir():
        got = f"{source.directory}, which has an adapter beside it that no stage would see"
        return [adapter_fault(got, "model")]
    if not (source.is_compressed and recipe.stages):
        return []
    return [packed_fault(source, "model")]


def _chain_faults(
    stage: Stage, layers: tuple[str, ...], before: list[PlannedStage], source: ModelSource, where: str
) -> list[Fault]:
    """What this place in the chain forbids, whatever the stage, which makes zeros in ``layers``."""
    faults = []
    last = next((s for s in before if getattr(s.stage, "ends_chain", False)), None)
    if last is not None:
        cure = f"Put {last.name} last, or set its finish to merge."
        got = f"{stage.kind} after {last.name}, whose adapter stands beside the model"
        faults.append(Fault(where, "a stage before the adapter's", got, cure))
    quantised = next((s for s in before if s.forecast.after.layer_bits), None)
    if stage.trains and quantised is not None and not getattr(stage, "keeps_grids", False):
        cure = "Put this stage before the quantisation."
        if hasattr(quantised.stage, "teacher"):
            cure = (
                f"Put this stage before {quantised.name}, or give the stage {quantised.stage.kind} a teacher."
            )
        faults.append(
            Fault(
                where,
                "training before quantisation",
                f"{stage.kind} after {quantised.name}, which would move weights off their grid",
                cure,
            )
        )
    inherited = inherited_promises(source.directory)
    zeroed = {s.name: s.zeroed for s in before} | {EARLIER: promised_layers(inherited)}
    faults += moving_faults(stage, layers, zeroed, where)
    held = [s for s in before if s.zeroed or s.forecast.after.layer_bits or not (s.trains or s.reshapes)]
    holds = held[0].name if held else EARLIER if inherited else ""
    if stage.reshapes and holds:
        got = f"a cut after {holds}, whose groups it would break"
        faults.append(Fault(where, "cutting before zeroing or quantising", got, "Put the cut first."))
    return faults


def _export_faults(recipe: Recipe, model: Outlook) -> list[Fault]:
    """What keeps a target of ``recipe.export`` from holding the ``model`` that the last stage leaves."""
    faults: list[Fault] = []
    last = next((s for s in recipe.stages if getattr(s, "ends_chain", False)), None)
    if recipe.export and last is not None:
        got = f"what {last.kind} leaves, an adapter beside the model that no target holds"
        faults.append(adapter_fault(got, "export"))
    for target in recipe.export:
        try:
            EXPORTS.require(target, where="export")
        except InputError as error:
            faults += [fault for fault in error.faults if isinstance(fault, Fault)]
            continue
        named = model.layer_schemes
        for index in range(max(map(len, named.values()), default=1)):
            schemes = {n: parse(texts[min(index, len(texts) - 1)]) for n, texts in named.items()}
            prospect = Prospect(
                anatomy=model.anatomy,
                config=model.config,
                tokenizer=model.tokenizer,
                schemes=schemes,
                trust_remote_code=model.trust_remote_code,
            )
            faults += EXPORTS[target]().faults(prospect, f"export: {target}")
    return list(dict.fromkeys(faults))


def data_of(recipe: Recipe) -> list[tuple[str, DataSpec]]:
    """Every data source that ``recipe`` names, by the field that names it."""
    named = [("data", recipe.data), ("evaluation", recipe.evaluation)]
    named += [(f"stages[{i}].data", getattr(stage, "data", None)) for i, stage in enumerate(recipe.stages)]
    return [(where, spec) for where, spec in named if spec is not None]


def _data_faults(recipe: Recipe) -> list[Fault]:
    return [fault for where, spec in data_of(recipe) for fault in check(spec, where)]


def _wordings(recipe: Recipe, source: ModelSource, known: list[Fault]) -> tuple[list[Fault], tuple[str, ...]]:
    """What is wrong with wording dialogues for this model's tokenizer, and how each source is worded."""
    faults: list[Fault] = []
    notes: tuple[str, ...] = ()
    for where, spec in data_of(recipe):
        if not any(fault.where.startswith((f"{where}: ", f"{where}.sources[")) for fault in known):
            found, said = foresee(spec, where, lambda: load_tokenizer(source))
            faults, notes = faults + found, notes + said
    return faults, notes


def _placed(fault: Fault, recipe: Recipe) -> Fault:
    return Fault(recipe.place(fault.where), fault.expected, fault.got, fault.cure)


ORDINARY = ("uniform", "all", "replicate", "none")
"""Choices that a summary need not tell."""


def summary(stage: Stage) -> str:
    """A stage in a few words: ``wanda 2:4``."""
    words = [getattr(stage, n, None) for n in ("method", "pattern", "scheme", "loss")]
    if stage.reshapes:
        words = [getattr(stage, "method", None), *(f"{k}={v}" for k, v in getattr(stage, "options", ()))]
    named = ("allocation", "recover", "features", "trainable", "teacher_placement", "alignment")
    choices = [getattr(stage, n, None) for n in named]
    words += [choice for choice in choices if choice and str(choice) not in ORDINARY]
    return " ".join(" + ".join(map(str, w)) if isinstance(w, tuple) else str(w) for w in words if w)


def _digest(data: Json) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
