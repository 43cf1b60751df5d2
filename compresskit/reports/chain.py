"""What a report is about: the steps of one chain, each with its records and what the manifest says of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compresskit.artifact import MANIFEST, RECORDS, is_artifact, open_artifact
from compresskit.errors import Fault, InputError
from compresskit.measure.record import Record, read_records
from compresskit.sparse import STRUCTURED_PRUNERS

Json = Any

FINAL = "artifact"
SECONDS = ".seconds.json"
CUT_FIELDS = ("layers", "ffn", "heads", "hidden", "parameters", "milliseconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One row of the report: the model before the first stage, after one of them, or as published.

    Attributes:
        name: of the checkpoint: ``0-source``, ``1-prune``, ``artifact``.
        kind: ``source``, the stage's kind, or ``artifact``.
        detail: what the recipe asked, in a few words: ``wanda 50%``.
        records: kind -> record.
        fields: of the stage in the recipe.
        layers: what the stage did to each layer.
        metrics: the stage's own figures.
        warnings: the stage's own.
        checks: kind of promise -> how many were checked and kept after this stage.
        losses: (optimiser step, training loss) of a stage that trains.
        seconds: that the stage took; None where it is not recorded.
    """

    name: str
    kind: str
    detail: str = ""
    records: Mapping[str, Record] = field(default_factory=dict)
    fields: Mapping[str, Json] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Json]] = ()
    metrics: Mapping[str, Json] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    checks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    seconds: float | None = None

    @property
    def title(self) -> str:
        """How the step is called in text: ``original``, ``prune``, ``artifact``."""
        return "original" if self.kind == "source" else self.kind

    def value(self, kind: str, name: str) -> float | None:
        """A measured number; None where it was not measured or does not apply."""
        value = self.records[kind].values.get(name) if kind in self.records else None
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One artifact's steps, or the subjects of loose records.

    Attributes:
        title: the model's name.
        place: the directory's or the file's name.
        steps: in order; figures are compared with the first.
        warnings: about the whole, this reader's own among them.
        recipe: as in the manifest; empty for loose records.
        versions: package -> version of the run.
    """

    title: str
    place: str
    steps: tuple[Step, ...]
    warnings: tuple[str, ...] = ()
    recipe: Mapping[str, Json] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def read_chain(path: Path) -> Chain:
    """Read an artifact directory, or a file or folder of records.

    Raises:
        InputError: it is none of them, or a record or the manifest is damaged.
    """
    if path.is_dir() and is_artifact(path):
        return _artifact_chain(path)
    if path.is_file():
        return chain_of(read_records(path), path.name)
    files = sorted(p for p in path.glob("*.json") if p.name != "config.json") if path.is_dir() else []
    if not files or (path / "config.json").exists():
        raise InputError(
            Fault(
                str(path),
                f"an artifact with a {MANIFEST}, or a file or folder of records",
                "a model that was never measured here" if path.is_dir() else "no such file",
                f"Measure it first: compresskit bench {path} -o records.json, then report records.json.",
            )
        )
    return chain_of([r for file in files for r in read_records(file)], path.name)


def chain_of(records: Iterable[Record], place: str = "records") -> Chain:
    """A chain whose steps are the subjects of ``records``, in the order they first appear."""
    steps: dict[str, dict[str, Record]] = {}
    for record in records:
        steps.setdefault(record.subject, {})[record.kind] = record
    if not steps:
        raise InputError(Fault(place, "at least one record", "none", "Measure a model first."))
    made = tuple(Step(name=name, kind=name, records=kinds) for name, kinds in steps.items())
    versions = next(iter(made[0].records.values())).versions
    return _checked(Chain(title=place, place=place, steps=made, versions=versions))


def _artifact_chain(path: Path) -> Chain:
    """The chain of one artifact directory."""
    manifest = open_artifact(path).manifest
    _require_keys(manifest, path / MANIFEST)
    records = _records_by_subject(path / RECORDS)
    stages = manifest["stages"]
    wanted = [next(iter(entry.values())) for entry in manifest["recipe"].get("stages", ())]
    steps = [_source_step(records)]
    for state, fields in zip(stages, wanted, strict=True):
        result, name = state["result"], state["name"]
        steps.append(
            Step(
                name=name,
                kind=state["kind"],
                detail=_detail(state["kind"], fields),
                records=records.pop(name, {}),
                fields=fields,
                layers=result["layers"],
                metrics=result["metrics"],
                warnings=tuple(result["warnings"]),
                checks=state["checks"],
                losses=_losses(path / RECORDS / f"{name}.losses.jsonl"),
                seconds=_seconds(path / RECORDS / f"{name}{SECONDS}"),
            )
        )
    _add_final(steps, records.pop(FINAL, {}))
    strangers = tuple(f"{path}: records of {name!r}, which is no stage of it." for name in records)
    model = str(manifest["recipe"].get("model", path.name))
    return _checked(
        Chain(
            title=Path(model).name or model,
            place=path.name,
            steps=tuple(steps),
            warnings=strangers,
            recipe=manifest["recipe"],
            versions=manifest["versions"],
        )
    )


def _source_step(records: dict[str, dict[str, Record]]) -> Step:
    name = next((n for n in records if n.startswith("0-") or n == "original"), "0-source")
    return Step(name=name, kind="source", records=records.pop(name, {}))


def _add_final(steps: list[Step], final: dict[str, Record]) -> None:
    """The published artifact: a row of its own, or the last stage's where that was not measured."""
    if final and steps[-1].records:
        steps.append(Step(name=FINAL, kind=FINAL, detail="as loaded", records=final))
    elif final:
        steps[-1] = replace(steps[-1], records=final)


def _require_keys(manifest: Mapping[str, Json], path: Path) -> None:
    missing = {"recipe", "versions", "stages"} - set(manifest)
    for index, state in enumerate(manifest.get("stages", ())):
        missing |= {f"stages[{index}].{k}" for k in ("name", "kind", "result", "checks") if k not in state}
    if not missing and len(manifest["stages"]) != len(manifest["recipe"].get("stages", ())):
        missing = {"one stage for each of the recipe's"}
    if missing:
        raise InputError(
            Fault(
                str(path), "a manifest of this version", f"no {', '.join(sorted(missing))}", "Run it again."
            )
        )


def _records_by_subject(folder: Path) -> dict[str, dict[str, Record]]:
    """Subject -> kind -> record, from every file that holds a list; the pipeline's own files hold none."""
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.read_text(encoding="utf-8", errors="replace").lstrip().startswith("["):
            for record in read_records(path):
                found.setdefault(record.subject, {})[record.kind] = record
    return found


def _losses(path: Path) -> tuple[tuple[int, float], ...]:
    """The training curve in ``path``, one JSON object a line; empty where there is none."""
    if not path.is_file():
        return ()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return tuple((int(r["step"]), float(r["loss"])) for r in rows if "step" in r and "loss" in r)


def _seconds(path: Path) -> float | None:
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def is_cut(fields: Mapping[str, Json]) -> bool:
    """Whether a prune stage's fields ask to take layers or neurons away, not to zero weights."""
    return fields.get("method") in STRUCTURED_PRUNERS


def _detail(kind: str, fields: Mapping[str, Json]) -> str:
    """The fields a reader looks for first."""
    method = str(fields.get("method", ""))
    if kind == "prune" and is_cut(fields):
        cuts = [f"{name} {fields[name]}" for name in CUT_FIELDS if fields.get(name) is not None]
        return " ".join([method, *cuts])
    if kind == "prune":
        return f"{method} {fields.get('pattern', '')}".strip()
    if kind == "quantize":
        return f"{method} {fields.get('scheme', '')}".strip()
    steps = f"{fields['steps']} steps" if fields.get("steps") else f"{fields.get('epochs', 1):g} epochs"
    named = [_word(fields.get(name, "")) for name in ("method", "pattern", "scheme", "loss")]
    return " ".join(word for word in (*named, steps) if word)


def _word(choice: Json) -> str:
    """How a reader says a name, a mapping of ``method`` and its own fields, or a list of such."""
    if isinstance(choice, list):
        return " + ".join(map(_word, choice))
    if not isinstance(choice, Mapping):
        return str(choice or "")
    own = [f"{name} {value}" for name, value in choice.items() if name != "method"]
    return f"{choice['method']} ({', '.join(own)})" if own else str(choice["method"])


def _checked(chain: Chain) -> Chain:
    """``chain`` with a warning for every record that was made under other conditions than the first's."""
    warnings = list(chain.warnings)
    for kind in ("quality", "latency", "memory"):
        made = [(s.title, s.records[kind]) for s in chain.steps if kind in s.records]
        for title, record in made[1:]:
            first = made[0][1]
            if differing := _differences(first, record):
                warnings.append(
                    f"The {kind} of {title} was measured under other conditions than that of {made[0][0]} "
                    f"({', '.join(differing)}): the two do not compare."
                )
    return replace(chain, warnings=tuple(warnings))


def _differences(first: Record, other: Record) -> list[str]:
    names = ("data", "context_length", "max_documents", "prompt_tokens", "decode_tokens", "batch_size")
    changed = [n for n in names if first.settings.get(n) != other.settings.get(n)]
    changed += [n for n in ("threads", "device", "processor") if getattr(first, n) != getattr(other, n)]
    if first.versions.get("torch") != other.versions.get("torch"):
        changed.append("torch")
    return changed
