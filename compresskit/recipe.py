"""Recipe: what the user wants. YAML or Python in, a frozen value out. No torch.

A recipe in YAML::

    model: path-or-hub-id
    data: "stdlib:"
    stages:
      - prune: {method: wanda, pattern: 2:4}
      - distill: {loss: forward_kl, steps: 200}
      - quantize: {method: rtn, scheme: w8a8}

Keys of a stage are the fields of its class; for a stage with a ``method`` any further key is a field
of that method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from compresskit.data.spec import STDLIB, DataSpec
from compresskit.errors import Fault, RecipeError
from compresskit.fields import coerce
from compresskit.options import Choice
from compresskit.registry import Registry, nearest
from compresskit.stage import Json, Stage
from compresskit.yaml12 import dump_yaml, parse_yaml

STAGES: Registry[Stage] = Registry(
    "stage",
    {
        "prune": "compresskit.sparse.stage:Prune",
        "distill": "compresskit.distill.stage:Distill",
        "finetune": "compresskit.distill.finetune:Finetune",
        "quantize": "compresskit.quant.stage:Quantize",
        "qat": "compresskit.quant.qat:Qat",
        "qlora": "compresskit.quant.qlora:Qlora",
        "sparse_train": "compresskit.sparse.train:SparseTrain",
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model, the stages that change it, and the data they may use.

    Attributes:
        model: directory, hub id, or a config.json to build anew.
        stages: in the order they run; may be empty for a plan of the model alone.
        tokenizer: directory or hub id; None takes the model's own.
        revision: of the hub repository.
        data: for every stage that names none of its own.
        export: targets of ``compresskit export`` to write beside the artifact's own form: ``gguf`` ...
        evaluation: what quality is measured on; None is the validation split of ``data``.
        seed: of the run; each stage derives its own.
        dtype: one-shot stages compute in; what is stored keeps its own. ``auto`` computes in that.
        device: ``auto`` takes an accelerator where there is one.
        trust_remote_code: let code in model directories run.
        origins: where each field was written, for errors: ``stages[0].pattern`` -> ``recipe.yaml:7``.
    """

    model: str
    stages: tuple[Stage, ...] = ()
    tokenizer: str | None = None
    revision: str | None = None
    data: DataSpec = field(default_factory=DataSpec)
    evaluation: DataSpec | None = None
    export: tuple[str, ...] = ()
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("data", "evaluation"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, DataSpec(source=value))
        object.__setattr__(self, "stages", tuple(self.stages))
        export = (self.export,) if isinstance(self.export, str) else tuple(self.export)
        object.__setattr__(self, "export", tuple(dict.fromkeys(export)))

    def place(self, where: str) -> str:
        """``where`` (``stages[0].pattern``) with the file and line, or the option, that wrote it."""
        path, _, rest = where.partition(": ")
        while path and path not in self.origins:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        origin = self.origins.get(path)
        return where if origin is None else f"{origin}: {rest}" if rest else f"{origin} {where}"

    def to_json(self) -> dict[str, Json]:
        """Every field resolved, as plain data that :func:`recipe_from` reads back to an equal recipe."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "origins"}
        plain["stages"] = [{stage.kind: stage_to_json(stage)} for stage in self.stages]
        return plain

    def to_yaml(self) -> str:
        """:meth:`to_json` as YAML that any YAML reader loads safely."""
        return dump_yaml(self.to_json())


def resolved(recipe: Recipe) -> Recipe:
    """``recipe`` with every path that exists made absolute, so that it runs from any directory."""
    stages = []
    for stage in recipe.stages:
        paths = {n: _absolute(getattr(stage, n, None)) for n in ("teacher", "deepspeed_config")}
        changed: dict[str, Any] = {name: path for name, path in paths.items() if path is not None}
        if getattr(stage, "data", None) is not None:
            changed["data"] = _absolute_data(stage.data)  # type: ignore[attr-defined]
        stages.append(replace(stage, **changed) if changed else stage)  # type: ignore[type-var]
    return replace(
        recipe,
        model=_absolute(recipe.model),
        tokenizer=_absolute(recipe.tokenizer),
        data=_absolute_data(recipe.data),
        evaluation=recipe.evaluation and _absolute_data(recipe.evaluation),
        stages=tuple(stages),
    )


def _absolute(path: Any) -> Any:
    """``path``, absolute if something is there, else (a hub id) as it is."""
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().exists() else path


def _absolute_data(spec: DataSpec) -> DataSpec:
    if spec.sources and spec.source == spec.name_of_sources:
        shares = tuple(replace(share, source=_absolute_source(share.source)) for share in spec.sources)
        return replace(spec, source=STDLIB, sources=shares)
    return replace(spec, source=_absolute_source(spec.source)) if spec.source else spec


def _absolute_source(source: str) -> str:
    is_glob = any(c in source for c in "*?[") and not Path(source).is_absolute()
    return str(Path.cwd() / source) if is_glob else str(_absolute(source))


def stage_to_json(stage: Stage) -> dict[str, Json]:
    """The fields of ``stage`` as plain data, the method's own fields among them."""
    plain = {f.name: _plain(getattr(stage, f.name)) for f in fields(stage)}  # type: ignore[arg-type]
    options = dict(plain.pop("options", ()))
    for name in ("overrides", "optimizer_options"):
        if name in plain:
            plain[name] = dict(plain[name])
    return {**plain, **options}


def _plain(value: Any) -> Json:
    if isinstance(value, Choice):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: of the file.
        overrides: dotted path -> YAML scalar, e.g. ``{"stages[0].steps": "20"}``.

    Returns:
        The recipe; errors found later name the line of this file.

    Raises:
        RecipeError: unreadable, malformed, unknown or ill-typed keys; all of them together.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            Fault(str(path), "a readable UTF-8 recipe", str(error), "Give the path of a recipe in YAML.")
        ) from error
    data, lines = parse_yaml(text, str(path))
    origins = {"recipe": str(path)} | {where: f"{path}:{line}" for where, line in lines.items()}
    for key, value in (overrides or {}).items():
        _override(data, key, parse_yaml(value, f"--set {key}")[0])
        origins[_flat(key)] = f"--set {key}"
    return recipe_from(data, origins)


def recipe_from(data: Json, origins: Mapping[str, str]) -> Recipe:
    """Build a recipe from plain data; ``origins`` maps each path to the place that wrote it.

    Raises:
        RecipeError: every fault together.
    """
    origins = {_flat(where): place for where, place in origins.items()}
    probe = Recipe(model="", origins=origins)
    if not isinstance(data, dict):
        raise RecipeError(
            Fault(
                probe.place("recipe"),
                "a mapping with the keys model and stages",
                "nothing" if data is None else type(data).__name__,
                "See the README.",
            )
        )
    faults: list[Fault] = []
    known = {f.name for f in fields(Recipe)} - {"origins"}
    values: dict[str, Any] = {}
    hints = get_type_hints(Recipe)
    for key, value in data.items():
        if key not in known:
            faults.append(_unknown_key(probe, key, known, "a recipe"))
        elif key != "stages":
            coerce(value, hints[key], probe.place(key), values, key, faults)
    if "model" not in data:
        faults.append(Fault(probe.place("recipe"), "the key model", "none", "Add 'model: PATH-OR-HUB-ID'."))
    stages: list[Stage] = []
    for index, entry in enumerate(_stage_entries(data.get("stages"), probe, faults)):
        stage = stage_from(entry, f"stages[{index}]", probe, faults)
        if stage is not None:
            stages.append(stage)
    if faults:
        raise RecipeError(*faults)
    return Recipe(**values, stages=tuple(stages), origins=origins)


def stage_from(entry: Json, where: str, recipe: Recipe, faults: list[Fault]) -> Stage | None:
    """One stage from ``{kind: {field: value}}``; appends to ``faults`` and returns None when it cannot be."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        faults.append(
            Fault(recipe.place(where), "one key, the kind of stage", repr(entry), "Write '- prune: {...}'.")
        )
        return None
    ((kind, given),) = entry.items()
    if kind not in STAGES:
        faults.append(_unknown_key(recipe, f"{where}.{kind}", STAGES, "a recipe's stages"))
        return None
    cls: Any = STAGES[kind]
    given = given or {}
    if not isinstance(given, dict):
        faults.append(
            Fault(recipe.place(where), f"a mapping of {kind}'s fields", repr(given), "See the README.")
        )
        return None
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    before = len(faults)
    for key, value in given.items():
        if key in known and key != "options":
            coerce(value, hints[key], recipe.place(f"{where}.{key}"), values, key, faults)
        elif "options" in known:
            options.update(value if key == "options" and isinstance(value, dict) else {key: value})
        else:
            faults.append(_unknown_key(recipe, f"{where}.{key}", known, f"the stage {kind}"))
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in given:
            faults.append(Fault(recipe.place(where), f"the key {name}", "none", f"Add '{name}: ...'."))
    if len(faults) > before:
        return None
    stage: Stage = cls(**values, **({"options": options} if options else {}))
    return stage


def _stage_entries(value: Json, recipe: Recipe, faults: list[Fault]) -> list[Json]:
    if isinstance(value, list) and value:
        return value
    got = "nothing" if not value else repr(value)
    faults.append(
        Fault(recipe.place("stages"), "a list of stages", got, "Write 'stages:' and '- prune: {...}'.")
    )
    return []


def _unknown_key(recipe: Recipe, where: str, known: Any, owner: str) -> Fault:
    key = where.rpartition(".")[2]
    return Fault(recipe.place(where), f"a key of {owner}", repr(key), f"Did you mean: {nearest(key, known)}?")


def _flat(where: str) -> str:
    """One spelling of a path: ``stages[0].prune.pattern`` and ``stages.0.pattern`` become one."""
    match = re.match(r"stages[.\[](\d+)\]?\.?(.*)$", where)
    if match is None:
        return where
    index, rest = match.groups()
    kind, _, tail = rest.partition(".")
    rest = tail if kind in STAGES else rest
    return f"stages[{index}].{rest}" if rest else f"stages[{index}]"


def _override(data: Json, key: str, value: Json) -> None:
    """Set ``key`` (a dotted path; a number picks a stage) in ``data`` in place."""
    *path, last = [p for p in key.replace("[", ".").replace("]", "").split(".") if p]
    here = data
    try:
        for index, part in enumerate(path):
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
            if index == 1 and path[0] == "stages" and isinstance(here, dict) and len(here) == 1:
                here = next(iter(here.values()))
        here[last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(
            Fault(f"--set {key}", "the path of a field, such as stages[0].steps", key, "Mend the path.")
        ) from error


__all__ = ["STAGES", "STDLIB", "Recipe", "load_recipe", "recipe_from", "stage_from", "stage_to_json"]
