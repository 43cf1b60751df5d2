"""A recipe against a model's skeleton and this machine: faults, bytes, memory. No weight is loaded."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from compresskit.artifact import inherited_promises
from compresskit.data import check
from compresskit.data.wording import foresee
from compresskit.errors import Fault, InputError, PlanError
from compresskit.exports import EXPORTS, runtimes_of
from compresskit.exports.base import Prospect, adapter_fault
from compresskit.exports.planned import export_notes
from compresskit.formats.checkpoint import ADAPTER
from compresskit.home import cache_home
from compresskit.modeling import ModelSource, load_tokenizer, open_model, resolve_device
from compresskit.modeling.packed import packed_fault
from compresskit.modeling.skeleton import resolve_dtype
from compresskit.planned import Plan, PlannedStage, data_of
from compresskit.quant.scheme import parse
from compresskit.recipe import Recipe, resolved
from compresskit.sparse.chain import moving_faults, promised_layers, zeroed_layers
from compresskit.sparse.worth import with_worth
from compresskit.stage import Outlook, Stage
from compresskit.training.faults import zero_faults

EARLIER = "the stages that made this model"


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
    cache = cache or cache_home()
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
    notes += export_notes(recipe.export, told, inherited_promises(source.directory), outlook, source)
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
    devices = torch.cuda.device_count()
    return source, Outlook.of(source, data=recipe.data, device=device, devices=devices)


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
    if getattr(stage, "moves_weights", False) and (layers or any(zeroed.values())):
        faults += zero_faults(stage, where, changing=bool(layers))  # type: ignore[arg-type]
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
