"""What can be told of a QLoRA stage before it runs: its faults, what it trains, the memory it takes.

Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from compresskit.calibration.oneshot import fit_faults, largest_layer
from compresskit.errors import Fault, InputError
from compresskit.quant.assignment import AUTO
from compresskit.quant.qlora import CHOICES, Qlora
from compresskit.quant.scheme import parse
from compresskit.registry import nearest
from compresskit.stage import Forecast
from compresskit.targets import select
from compresskit.training.adapters.outlook import (
    beside_notes,
    frozen_bytes,
    layer_faults,
    package_faults,
    prefix_faults,
    rank_faults,
    size_faults,
    trained_parameters,
    unmergeable_faults,
)
from compresskit.training.outlook import forecast_training, student_faults
from compresskit.training.setting import Setting, launched_processes
from compresskit.training.trainable import BESIDE, LOW_RANK

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy, Linear
    from compresskit.stage import Outlook

SCALE_BYTES = 1 / 64
BASE_BYTES = {"nf4": 0.5 + SCALE_BYTES, "int8": 1.0}
"""Of one weight frozen in few bits; an NF4 block of 64 has one scale of 8 bits."""


def qlora_faults(stage: Qlora, model: Outlook, where: str) -> list[Fault]:
    """Everything wrong with ``stage`` for such a ``model``.

    Args:
        stage: of the recipe.
        model: what the stage will be given.
        where: prefix of each fault.
    """
    faults = student_faults(stage, model, where)
    faults += [
        Fault(
            f"{where}.{name}",
            f"one of {', '.join(known)}",
            repr(getattr(stage, name)),
            f"Did you mean: {nearest(str(getattr(stage, name)), known)}?",
        )
        for name, known in CHOICES.items()
        if getattr(stage, name) not in known
    ]
    faults += _number_faults(stage, where)
    try:
        layers = select(model.anatomy, stage.targets, stage.ignore, where=where)
    except InputError as error:
        return faults + [f for f in error.faults if isinstance(f, Fault)]
    gridded = tuple(layer for layer in layers if layer in model.layer_bits)
    all_gridded = len(gridded) == len(layers)
    faults += _package_faults(stage, all_gridded, where)
    faults += layer_faults(model.anatomy, layers, where)
    if stage.adapter in LOW_RANK:
        faults += rank_faults(stage.rank, model.anatomy, layers, where)
    faults += _split_faults(stage, model.anatomy, [n for n in layers if n not in gridded], where)
    faults += (
        prefix_faults(stage.rank, stage.context_length, model, where) if stage.adapter == "prefix" else []
    )
    faults += _loftq_faults(stage, where) + _idle_faults(stage, all_gridded, where)
    return faults + _static_faults(stage, model, where) + _finish_faults(stage, model, layers, gridded, where)


def _split_faults(stage: Qlora, anatomy: Anatomy, layers: Sequence[str], where: str) -> list[Fault]:
    """Two weights are in a byte, and four bytes in each of the numbers that ranks split among them."""
    setting = Setting(stage, launched_processes() or stage.processes, "cpu")
    if stage.base != "nf4" or not setting.shards_parameters:
        return []

    def misfit(linear: Linear) -> str:
        fits = linear.in_features * linear.out_features % 8 == 0
        return (
            "" if fits else f"weights that strategy {setting.strategy} can split in 4 bits: a multiple of 8"
        )

    cure = "Use strategy ddp, or add these layers to ignore."
    return fit_faults(anatomy.linears, layers, misfit, where=f"{where}.strategy", cure=cure)


def _number_faults(stage: Qlora, where: str) -> list[Fault]:
    faults = size_faults(stage.rank, stage.alpha, stage.dropout, where)
    if stage.loftq_rounds < 0:
        got = str(stage.loftq_rounds)
        faults.append(Fault(f"{where}.loftq_rounds", "at least 0", got, "Raise loftq_rounds."))
    return faults


def _package_faults(stage: Qlora, all_gridded: bool, where: str) -> list[Fault]:
    freezes = stage.base != "none" and not all_gridded
    faults = package_faults("peft", f"{where}.adapter")
    return faults + (package_faults("bitsandbytes", f"{where}.base") if freezes else [])


def _loftq_faults(stage: Qlora, where: str) -> list[Fault]:
    if not stage.loftq_rounds:
        return []
    wrong = {
        f"adapter {stage.adapter}": (stage.adapter in LOW_RANK, "Use lora or dora"),
        "base none, which rounds nothing": (stage.base != "none", "Use base nf4 or int8"),
        "finish adapter, whose model stays as it was": (stage.finish != BESIDE, "Use finish merge"),
        "merge_into original": (stage.merge_into != "original", "Use merge_into trained"),
    }
    expected = "an adapter that is merged into the rounded weights it started with"
    return [
        Fault(f"{where}.loftq_rounds", expected, got, f"{cure}, or set loftq_rounds to 0.")
        for got, (right, cure) in wrong.items()
        if not right
    ]


def _idle_faults(stage: Qlora, all_gridded: bool, where: str) -> list[Fault]:
    """Fields that were set, though nothing reads them."""
    grids = "targets that all lie on a grid" if all_gridded else ""
    other = "" if stage.adapter in LOW_RANK else f"adapter {stage.adapter}"
    free = f"{other} on base none" if other and stage.base == "none" else ""
    beside = "finish adapter" if stage.finish == BESIDE else ""
    idle = {
        "alpha": other,
        "dropout": other if stage.adapter == "prefix" else "",
        "targets": free,
        "ignore": free,
        "rounding": "" if stage.scheme is not None else f"finish {stage.finish} without a scheme",
        "base": grids,
        "loftq_rounds": grids,
        "merge_into": beside or grids or ("base none" if stage.base == "none" else ""),
    }
    return [
        Fault(
            f"{where}.{field.name}",
            f"nothing beside {idle[field.name]}",
            repr(getattr(stage, field.name)),
            "Leave this field out: it would have no effect.",
        )
        for field in fields(stage)
        if idle.get(field.name) and getattr(stage, field.name) != field.default
    ]


def _static_faults(stage: Qlora, model: Outlook, where: str) -> list[Fault]:
    """Scales of inputs that calibration fixed are those of the model before it was trained."""
    static = [name for name, texts in model.layer_schemes.items() if any(parse(t).static for t in texts)]
    if not static:
        return []
    got = f"scales fixed by calibration in {len(static)} layers, such as {static[0]}"
    cure = "Quantise with w8a8 instead of w8a8-static"
    cure += "." if stage.ends_chain else ", or put this stage before the quantisation."
    return [Fault(where, "layers that find the scale of an input as the model runs", got, cure)]


def _finish_faults(
    stage: Qlora, model: Outlook, layers: Sequence[str], gridded: tuple[str, ...], where: str
) -> list[Fault]:
    if gridded and (stage.adapter != "lora" or stage.finish != "grid"):
        return [_grid_fault(stage, gridded, where)]
    if faults := unmergeable_faults(stage.adapter, stage.finish, where):
        return faults
    if stage.finish != "grid" and stage.scheme is not None:
        cure = "Set finish to grid, or drop scheme."
        return [Fault(f"{where}.scheme", "none", f"{stage.scheme} with finish {stage.finish}", cure)]
    if stage.finish != "grid":
        return []
    if stage.scheme is None:
        if gridded:
            return []
        cure = "Give a scheme, such as w4a16-g64, or set finish to merge."
        return [Fault(f"{where}.finish", "a grid in force, or a scheme for a new one", "neither", cure)]
    if len(gridded) == len(layers):
        got = f"{stage.scheme}, where every target is on a grid already"
        return [Fault(f"{where}.scheme", "none", got, "Drop scheme: the grid in force is kept.")]
    if stage.scheme.strip().lower() == AUTO:
        cure = "Name a scheme, or set finish to merge and quantise in a stage of its own."
        return [Fault(f"{where}.scheme", "one scheme, such as w4a16-g64", stage.scheme, cure)]
    return [_renamed(fault, where) for fault in stage.requantise(gridded).faults(model, where)]


def _grid_fault(stage: Qlora, gridded: Sequence[str], where: str) -> Fault:
    """Only LoRA that is rounded as it trains can be on weights that lie on a grid."""
    got = f"{len(gridded)} quantised layers, such as {gridded[0]}, with finish {stage.finish}"
    cure = "Set finish to grid"
    if stage.adapter != "lora":
        got = f"{stage.adapter} on {got}"
        cure = "Use adapter lora with finish grid"
    # An adapter that stays beside the model ends the chain, and no quantisation can follow it.
    last = stage.finish == BESIDE or stage.adapter not in LOW_RANK
    cure += "." if last else ", or put this stage before the quantisation."
    name = "finish" if stage.adapter == "lora" else "adapter"
    return Fault(f"{where}.{name}", "lora with finish grid, which keeps weights on theirs", got, cure)


def _renamed(fault: Fault, where: str) -> Fault:
    """What a stage ``quantize`` would say, in the names of this one's fields."""
    if fault.where == f"{where}.method":
        fault = replace(fault, where=f"{where}.rounding")
    if "overrides" in fault.cure:
        fault = replace(fault, cure="Choose another scheme, or add these layers to ignore.")
    return fault


def held_bytes(stage: Qlora, model: Outlook, layers: Iterable[str]) -> dict[str, float]:
    """Of one weight of each layer that is frozen in few bits."""
    base = BASE_BYTES.get(stage.base)
    each = {name: 1.0 if name in model.layer_bits else base for name in layers}
    return {name: count for name, count in each.items() if count is not None}


def forecast_qlora(stage: Qlora, model: Outlook) -> Forecast:
    """Memory of one process: the frozen model, 16 bytes per trained parameter, and activations.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
    """
    anatomy = model.anatomy
    layers = select(anatomy, stage.targets, stage.ignore)
    frozen = frozen_bytes(anatomy, model.weight_bytes, held_bytes(stage, model, layers))
    # The layer that is frozen last, in float32, before and after it is rounded.
    frozen += 2 * 4 * largest_layer(anatomy, layers)
    trained = trained_parameters(stage.adapter, stage.rank, anatomy, model.config, layers)
    found = forecast_training(stage, model, trained=trained, other_bytes=frozen)
    notes = (*found.notes, *_notes(stage), *unrounded_inputs(_rounding_inputs(model)))
    after, memory, scratch = model, found.memory_bytes, 0
    if stage.finish == "grid" and stage.scheme is not None:
        gridded = tuple(name for name in layers if name in model.layer_bits)
        rounding = stage.requantise(gridded).forecast(model)
        after, memory = rounding.after, max(memory, rounding.memory_bytes)
        notes += rounding.notes
        scratch = round(anatomy.num_parameters * model.weight_bytes)  # merged, before it is rounded
    return Forecast(
        after=after,
        layers=len(layers),
        memory_bytes=memory,
        scratch_bytes=scratch,
        notes=notes,
    )


def _rounding_inputs(model: Outlook) -> tuple[str, ...]:
    """The layers that round their inputs as the model runs, or may come to."""
    schemes = model.layer_schemes
    return tuple(name for name, texts in schemes.items() if any(parse(t).activation_bits for t in texts))


def unrounded_inputs(layers: Sequence[str]) -> tuple[str, ...]:
    """What to say of ``layers`` that round their inputs wherever the model runs, but not in training."""
    if not layers:
        return ()
    return (
        f"{len(layers)} layers, such as {layers[0]}, round their inputs as the model runs; while adapters "
        "train, no input is rounded.",
    )


def _notes(stage: Qlora) -> tuple[str, ...]:
    if stage.base != "none" and stage.finish == "merge" and stage.merge_into == "trained":
        return (
            f"The merged weights are {stage.base}-rounded ones plus the update, as they were trained, stored "
            "in the model's own type.",
        )
    return beside_notes(stage.adapter, stage.finish)
