"""Everything wrong with the fields of a stage that trains, told at plan time. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import isfinite

from compresskit.errors import Fault
from compresskit.registry import nearest
from compresskit.training.fields import TrainingFields
from compresskit.training.optimizers import CHANGED, MOVED, OPTIMIZERS
from compresskit.training.rules import RULES
from compresskit.training.rules.base import Rule
from compresskit.training.rules.memory import NOISE
from compresskit.training.setting import Setting, launched_processes

DIVIDE = ("batch_size", "processes", "micro_batch_size", "replicas", "tensor_parallel")
"""Fields that others are divided by or into."""
SAID = ("device", "devices", "cores", "processes", "data_ranks", "micro_batch_size", "passes")
"""What a rule may say of a setting, besides its fields."""
CROWDED = ("more-processes-than-devices", "more-processes-than-cores")
"""Rules that are of a machine and of nothing else."""


def zero_faults(fields: TrainingFields, where: str, *, changing: bool = False) -> list[Fault]:
    """What is wrong where weights are zero and have to stay so: with the optimiser, or a batch that grows.

    Args:
        fields: of a stage that trains these weights themselves.
        where: prefix of the fault.
        changing: whether which weights are zero changes while it trains.
    """
    if changing and fields.adapt_batch == NOISE:
        expected = "none where zeros change on a schedule of steps"
        return [Fault(f"{where}.adapt_batch", expected, NOISE, "Leave adapt_batch out.")]
    known = OPTIMIZERS.get(fields.optimizer)
    if known is None or known.zeros == CHANGED or (known.zeros != MOVED and not changing):
        return []
    alike = "rmsprop" if "rmsprop" in fields.optimizer else "adamw_torch"
    alike = "lion" if "lion" in fields.optimizer else alike
    if known.zeros == MOVED:
        expected = "an optimiser that keeps pruned weights at zero"
    else:
        expected = "an optimiser whose state can forget the weights that become zero"
    return [Fault(f"{where}.optimizer", expected, fields.optimizer, f"Use optimizer {alike}.")]


def option_faults(fields: TrainingFields, where: str) -> list[Fault]:
    """What is wrong with ``optimizer_options``."""
    known = OPTIMIZERS.get(fields.optimizer)
    if known is None:
        return []
    faults = []
    for name, value in dict(fields.optimizer_options).items():
        place = f"{where}.optimizer_options.{name}"
        if name not in known.options:
            expected = f"an option of {fields.optimizer}: {', '.join(known.options) or 'it has none'}"
            cure = f"Did you mean: {nearest(name, known.options)}?" if known.options else "Leave it out."
            faults.append(Fault(place, expected, repr(name), cure))
        elif not known.expected(name).fits(value):
            faults.append(Fault(place, known.expected(name).words, repr(value), f"Change {name}."))
    return faults


def number_faults(fields: TrainingFields, where: str) -> list[Fault]:
    """Fields that must be positive, or not negative, and are not."""
    least = {"batch_size": 1, "processes": 1, "eval_every": 0, "checkpoint_every": 0, "checkpoint_blocks": 1}
    least |= {"weight_decay": 0, "warmup_fraction": 0, "workers": 0, "prefetch": 1}
    least |= {"replicas": 1, "tensor_parallel": 1, "synchronise_from": 0, "trace": 0}
    for name in ("steps", "micro_batch_size", "context_length", "reference_batch_size"):
        if getattr(fields, name) is not None:
            least[name] = 2 if name == "context_length" else 1
    values = {name: getattr(fields, name) for name in TrainingFields.__dataclass_fields__}
    odd = [name for name, value in values.items() if isinstance(value, float) and not isfinite(value)]
    faults = [
        Fault(f"{where}.{name}", f"at least {low}", str(getattr(fields, name)), f"Raise {name}.")
        for name, low in least.items()
        if name not in odd and getattr(fields, name) < low
    ]
    faults += [
        Fault(f"{where}.{name}", "a finite number", str(getattr(fields, name)), f"Change {name}.")
        for name in odd
    ]
    faults += [
        Fault(f"{where}.{name}", "a number above 0", str(getattr(fields, name)), f"Raise {name}.")
        for name in ("learning_rate", "max_grad_norm", "epochs")
        if name not in odd and not getattr(fields, name) > 0
    ]
    if "warmup_fraction" not in odd and not fields.warmup_fraction < 1:
        got = str(fields.warmup_fraction)
        faults.append(
            Fault(
                f"{where}.warmup_fraction", "less than 1", got, "Give a fraction of the steps, such as 0.05."
            )
        )
    return faults


def training_faults(
    fields: TrainingFields, where: str, *, device: str = "cpu", devices: int = 0, cores: int = 0
) -> list[Fault]:
    """Everything wrong with ``fields`` here and now.

    Args:
        fields: of a stage that trains.
        where: prefix of each fault, e.g. ``stages[1]``.
        device: ``cpu`` or ``cuda``.
        devices: accelerators of this machine; 0 where that is no limit.
        cores: of this machine's CPU; 0 where that is no limit.

    Returns:
        One fault per broken rule, and per number out of range.
    """
    faults = number_faults(fields, where) + option_faults(fields, where)
    if any(f.where.removeprefix(f"{where}.") in DIVIDE for f in faults):
        return faults
    launched = launched_processes()
    devices, cores = (0, 0) if launched else (devices, cores)
    setting = Setting(fields, launched or fields.processes, device, devices, cores)
    return faults + [fault for _, fault in broken_rules(setting, where)]


def crowd_faults(processes: int, where: str, *, device: str, devices: int, cores: int) -> list[Fault]:
    """Why a machine has no room for so many ``processes``, whatever they train.

    Args:
        processes: of a launch, on this machine.
        where: of each fault.
        device: ``cpu`` or ``cuda``.
        devices: accelerators of this machine; 0 where that is no limit.
        cores: of this machine's CPU; 0 where that is no limit.
    """
    setting = Setting(TrainingFields(batch_size=processes), processes, device, devices, cores)
    rules = [rule for rule in RULES if rule.name in CROWDED]
    return [replace(fault, where=where) for _, fault in broken_rules(setting, where, rules)]


def broken_rules(setting: Setting, where: str, rules: Iterable[Rule] = RULES) -> Iterator[tuple[Rule, Fault]]:
    """Those of ``rules`` that ``setting``, whose numbers are in range, breaks, each with its fault."""
    fields = setting.fields
    said = {name: getattr(fields, name) for name in fields.__dataclass_fields__}
    said |= {name: getattr(setting, name) for name in SAID}
    for rule in rules:
        if rule.broken(setting):
            expected, got = rule.expected.format(**said), rule.got.format(**said)
            yield rule, Fault(f"{where}.{rule.field}", expected, got, rule.cure)
