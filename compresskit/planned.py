"""What a recipe comes to for one model on one machine: its stages, bytes and memory, and how to name it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from compresskit.data import open_corpus
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, OutputError
from compresskit.exports import EXPORTS
from compresskit.modeling import ModelSource
from compresskit.progress import size
from compresskit.recipe import Recipe
from compresskit.stage import Forecast, Json, Outlook, Stage
from compresskit.training.carried import BESIDE, HOW, LEARNT
from compresskit.training.rules.asynchronous import ALONE, EVERY_STEP
from compresskit.training.rules.deepspeed import config_at, learnt_of

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
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
"""Of weights, configuration, tokenizer, how it words dialogues, and code that may run."""


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
    def facts(self) -> dict[str, str]:
        """What must be the same wherever a part of this plan runs: recipe, model, data and packages."""
        facts = {f"recipe {where}": value for where, value in _leaves(self.recipe.to_json(), "")}
        facts |= {f"file {where}": value for where, value in _leaves(self._deepspeed_configs, "")}
        facts["model"] = self.source_fingerprint
        files = [f for f in sorted(self.source.directory.iterdir()) if f.suffix in MODEL_SUFFIXES]
        facts["files of the model"] = ", ".join(f"{f.name} {f.stat().st_size}" for f in files)
        facts |= {f"data: text of {where}": value for where, value in self.data_fingerprints.items()}
        return facts | {f"version of {name}": value for name, value in self.versions.items()}

    @property
    def resume_key(self) -> str:
        """:attr:`digest`, the data, the state of the source's files, what a ds_config.json of the user's
        own says: a restart continues where all agree."""
        read = [self.data_fingerprints, self._file_states, self._deepspeed_configs]
        return _digest([self.digest, *read])

    @property
    def work_key(self) -> str:
        """:attr:`resume_key` but for how training is carried out: what another way began goes on."""
        recipe = self.recipe.to_json()
        stages = [next(iter(named.items())) for named in recipe["stages"]]
        recipe["stages"] = [{kind: _matter(stage)} for kind, stage in stages]
        facts = [recipe, self.source_fingerprint, self.versions]
        return _digest([*facts, self.data_fingerprints, self._file_states])

    @property
    def _deepspeed_configs(self) -> dict[str, Json]:
        """What the ds_config.json of a stage says, by the field that names it."""
        named = [getattr(s.stage, "deepspeed_config", None) for s in self.stages]
        return {f"stages[{i}].deepspeed_config": config_at(path) for i, path in enumerate(named) if path}

    @property
    def _file_states(self) -> list[Json]:
        """Name, size and time of every file that the model and the teachers are made of."""
        directories = [self.source.directory, *self.teachers.values()]
        files = [f for d in directories for f in sorted(d.iterdir()) if f.suffix in MODEL_SUFFIXES]
        return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]

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
            writers = _writers(stage.stage)
            need += dense + (2 * 12 * writers * after.anatomy.num_parameters if stage.trains else 0)
            need += stage.forecast.scratch_bytes
            if stage is self.stages[-1]:
                widths = [max(EXPORTS[to].least_bytes, after.weight_bytes) for to in self.recipe.export]
                need += dense + round(after.anatomy.num_parameters * sum(widths))
        return need + DISK_MARGIN_BYTES

    def check_disk(self, place: Path) -> None:
        """Raise OutputError unless the disk holds what the chain writes under ``place``; part may be."""
        written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        free = shutil.disk_usage(place if place.exists() else place.parent).free + written
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


def data_of(recipe: Recipe) -> list[tuple[str, DataSpec]]:
    """Every data source that ``recipe`` names, by the field that names it."""
    named = [("data", recipe.data), ("evaluation", recipe.evaluation)]
    named += [(f"stages[{i}].data", getattr(stage, "data", None)) for i, stage in enumerate(recipe.stages)]
    return [(where, spec) for where, spec in named if spec is not None]


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


def _leaves(data: Json, where: str) -> Iterator[tuple[str, str]]:
    """Every value of nested plain data, by its path: ``stages[0].prune.pattern``."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _leaves(value, f"{where}.{name}" if where else name)
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _leaves(value, f"{where}[{index}]")
    else:
        yield where, str(data)


def _matter(stage: dict[str, Json]) -> dict[str, Json]:
    """What a stage does; of one that trains not how that is carried out, nor where a live teacher lies."""
    if "pipeline_stages" not in stage:
        return stage
    # Ranks that step alone learn what so many of them do; ZenFlow chooses columns in each rank's part.
    learnt = LEARNT if stage["synchronise"] == EVERY_STEP else (*LEARNT, "processes")
    kept = {name: value for name, value in stage.items() if name in learnt or name not in (*HOW, *BESIDE)}
    placement = kept.get("teacher_placement")
    if (placement["method"] if isinstance(placement, dict) else placement) in ("replicate", "shard"):
        del kept["teacher_placement"]
    return kept | {"deepspeed_config": learnt_of(config_at(stage["deepspeed_config"]))}


def _digest(data: Json) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _writers(stage: Stage) -> int:
    """Processes that each write whole weights and states into a checkpoint."""
    stages = getattr(stage, "pipeline_stages", 1)
    alone = stages > 1 or getattr(stage, "synchronise", "") in ALONE
    return max(1, getattr(stage, "processes", 1) // stages) if alone else 1
