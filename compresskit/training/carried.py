"""How a training run is carried out, beside what it is: what may change between two starts. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from compresskit.errors import Fault
from compresskit.training.optimizers import OPTIMIZERS
from compresskit.training.rules.asynchronous import EVERY_STEP
from compresskit.training.rules.deepspeed import config_at, is_on_nvme
from compresskit.training.setting import Setting

Carried = Mapping[str, Any]
"""Names of :data:`HOW` -> what they were; and ``counts``, see :data:`COUNTS`."""

WITHIN = (
    "micro_batch_size",
    "activation_checkpointing",
    "checkpoint_blocks",
    "checkpoint_operators",
    "offload_activations",
    "overlap",
    "shares",
)
"""Fields that are of the passes of a step: no checkpoint depends on them."""
LAID_OUT: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "fsdp": (),
    "mesh": ("strategy", "processes", "replicas", "tensor_parallel"),
    "deepspeed": ("processes", "zero_stage", "deepspeed_config", "offload", "offload_device", "nvme_path"),
    "pipeline": ("processes", "pipeline_stages", "pipeline_schedule"),
    "grown": ("adapt_batch", "strategy", "processes", "micro_batch_size", "zero_stage", "tensor_parallel"),
    "alone": (
        "processes",
        "micro_batch_size",
        "synchronise",
        "synchronise_every",
        "synchronise_from",
        "synchronise_delay",
        "outer_learning_rate",
        "outer_momentum",
    ),
}
"""Kind of checkpoint -> fields that must be the same for an engine of that kind to read its own."""
HOW = tuple(dict.fromkeys(("strategy", *(name for some in LAID_OUT.values() for name in some), *WITHIN)))
"""Fields that change how a run is carried out, and but for :data:`LEARNT` not what it learns."""
LEARNT = tuple(name for name in LAID_OUT["alone"] if name not in ("processes", "micro_batch_size"))
"""Of these, fields that change what it learns too: a finished stage is another one with others."""
BESIDE = ("checkpoint_every", "trackers", "workers", "prefetch", "trace")
"""Fields that change neither."""
COUNTS = re.compile(r"\b(?:passes_per_step|observed_passes)=\d+|\btwice=[(\[][^)\]]*[)\]]")
"""What an adaptation that counts its forward passes says of how many make a step."""
OF_RANKS = {
    "pipeline": "weights that no pipeline divides",
    "grown": "a batch that does not grow with the noise of gradients, which passes and ranks measure",
    "alone": f"weights that all ranks agree on, and no update that comes late (synchronise {EVERY_STEP})",
}


def carried_out(setting: Setting, adaptation: str = "") -> dict[str, Any]:
    """How a run is carried out under ``setting``, where its model was changed by ``adaptation``."""
    facts = {name: getattr(setting.fields, name) for name in HOW}
    facts |= {"strategy": setting.strategy, "processes": setting.processes}
    facts["deepspeed_config"] = config_at(setting.fields.deepspeed_config)  # wherever the file lies
    return facts | {"micro_batch_size": setting.micro_batch_size, "counts": COUNTS.findall(adaptation)}


def kind_of(carried: Carried) -> str:
    """Which of the kinds of :data:`LAID_OUT` its checkpoints are."""
    if carried["adapt_batch"] == "noise":
        return "grown"
    if carried["pipeline_stages"] > 1:
        return "pipeline"
    if carried["synchronise"] != EVERY_STEP:
        return "alone"
    if carried["strategy"] == "tp" or carried["replicas"] > 1 or carried["tensor_parallel"] > 1:
        return "mesh"
    return carried["strategy"] if carried["strategy"] in LAID_OUT else "plain"


def reads(old: Carried, new: Carried) -> bool:
    """Whether the engine of ``new`` reads checkpoints of ``old`` by itself."""
    kind = kind_of(old)
    return kind == kind_of(new) and all(old[name] == new[name] for name in LAID_OUT[kind])


def moved(old: Carried, new: Carried) -> bool:
    """Whether other processes, or others of them, hold what is trained."""
    return not reads(old, new) or old["processes"] != new["processes"]


def refusal(old: Carried, new: Carried, optimizer: str, place: str) -> Fault | None:
    """Why a checkpoint of ``old`` cannot go on under ``new``; None where it can.

    Args:
        old: of the checkpoint.
        new: of this start.
        optimizer: of both.
        place: the checkpoint, in words.
    """
    names = [name for name in HOW if old[name] != new[name] and name not in WITHIN]
    names += [name for name in WITHIN if old[name] != new[name] and (not names or old["counts"])]
    back = ", ".join(f"{name}: {old[name]}" for name in names)
    cure = f"Go back to {back}, or choose another output directory to begin anew."
    if old["counts"] != new["counts"]:
        expected = "as many forward passes a step as before, which the model counts"
        return Fault(place, expected, f"{words(new)} after {words(old)}", cure)
    if reads(old, new):
        return None
    for kind, expected in OF_RANKS.items():
        if kind in (kind_of(old), kind_of(new)):
            return Fault(place, expected, f"{words(new)} after {words(old)}", cure)
    if any(one["offload_device"] == "nvme" or is_on_nvme(one["deepspeed_config"]) for one in (old, new)):
        return Fault(place, "states in memory", "states on a drive (nvme)", cure)
    if not is_by_parameter(optimizer):
        expected = "an optimiser whose states are numbers of single weights (adamw_torch, sgd, muon ...)"
        return Fault(place, expected, optimizer, cure)
    return None


def is_by_parameter(optimizer: str) -> bool:
    """Whether each state of ``optimizer`` is a plain number for each weight, or one for a parameter."""
    return optimizer == "muon" or OPTIMIZERS[optimizer].source.startswith("torch.optim:")


def words(carried: Carried) -> str:
    """``fsdp on 2 processes``."""
    kind, said = kind_of(carried), [carried["strategy"]]
    if kind == "deepspeed":
        said = [f"deepspeed ZeRO-{carried['zero_stage']}"]
    elif kind == "pipeline":
        said = [f"a pipeline of {carried['pipeline_stages']} stages"]
    elif kind == "alone":
        said = [carried["synchronise"]]
    elif kind == "mesh" and carried["strategy"] == "fsdp":
        said += [f"{name} {carried[name]}" for name in ("replicas", "tensor_parallel") if carried[name] > 1]
    processes = carried["processes"]
    if processes == 1:
        return "one process" if kind == "plain" else f"{said[0]} on one process"
    return f"{' '.join(said)} on {processes} processes"
