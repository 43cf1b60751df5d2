"""Everything wrong with the fields of a stage that trains, told at plan time. No torch."""

from __future__ import annotations

from compresskit.errors import Fault
from compresskit.training.fields import TrainingFields
from compresskit.training.rules import EIGHT_BIT, RULES, Setting, launched_processes


def eight_bit_faults(fields: TrainingFields, where: str) -> list[Fault]:
    """What is wrong with the optimiser's states for training the weights of layers themselves."""
    if fields.optimizer not in EIGHT_BIT:
        return []
    expected = "an optimiser that keeps pruned weights at zero"
    cure = "Use optimizer adamw_torch; 8-bit states are for stages that train adapters."
    return [Fault(f"{where}.optimizer", expected, fields.optimizer, cure)]


def number_faults(fields: TrainingFields, where: str) -> list[Fault]:
    """Fields that must be positive, or not negative, and are not."""
    least = {"batch_size": 1, "processes": 1, "eval_every": 0, "checkpoint_every": 0}
    least |= {"weight_decay": 0, "warmup_fraction": 0}
    for name in ("steps", "micro_batch_size", "context_length"):
        if getattr(fields, name) is not None:
            least[name] = 2 if name == "context_length" else 1
    faults = [
        Fault(f"{where}.{name}", f"at least {low}", str(getattr(fields, name)), f"Raise {name}.")
        for name, low in least.items()
        if getattr(fields, name) < low
    ]
    for name in ("learning_rate", "max_grad_norm", "epochs"):
        if not getattr(fields, name) > 0:
            got = str(getattr(fields, name))
            faults.append(Fault(f"{where}.{name}", "a number above 0", got, f"Raise {name}."))
    if not fields.warmup_fraction < 1:
        got = str(fields.warmup_fraction)
        faults.append(
            Fault(
                f"{where}.warmup_fraction", "less than 1", got, "Give a fraction of the steps, such as 0.05."
            )
        )
    return faults


def training_faults(
    fields: TrainingFields, where: str, *, device: str = "cpu", devices: int = 0
) -> list[Fault]:
    """Everything wrong with ``fields`` here and now.

    Args:
        fields: of a stage that trains.
        where: prefix of each fault, e.g. ``stages[1]``.
        device: ``cpu`` or ``cuda``.
        devices: accelerators of this machine; 0 where that is no limit.

    Returns:
        One fault per broken rule, and per number out of range.
    """
    faults = number_faults(fields, where)
    if any(f.where.endswith((".batch_size", ".processes", ".micro_batch_size")) for f in faults):
        return faults
    launched = launched_processes()
    setting = Setting(fields, launched or fields.processes, device, 0 if launched else devices)
    said = {name: getattr(fields, name) for name in fields.__dataclass_fields__}
    said |= {name: getattr(setting, name) for name in ("device", "devices", "processes", "micro_batch_size")}
    faults += [
        Fault(f"{where}.{rule.field}", rule.expected.format(**said), rule.got.format(**said), rule.cure)
        for rule in RULES
        if rule.broken(setting)
    ]
    return faults
