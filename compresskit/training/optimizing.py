"""From the name of an optimiser to the class and the arguments that make it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from compresskit.modeling.anatomy import anatomy_of
from compresskit.training.fields import TrainingFields
from compresskit.training.optimizers import OPTIMIZERS, Known

Made = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def optimizer_of(
    fields: TrainingFields, model: nn.Module, decayed: Iterable[str], *, rate: float, warmup_steps: int
) -> Made:
    """The class of the optimiser that ``fields`` name, and what it is made with.

    Args:
        fields: of the stage, without faults.
        model: in training; an engine may have prepared it.
        decayed: names of its parameters that weight decay is for.
        rate: the peak of the learning rate.
        warmup_steps: for an optimiser that warms up by itself.

    Returns:
        Class and keyword arguments; with ``params`` among them where not all parameters are stepped alike.
    """
    known = OPTIMIZERS[fields.optimizer]
    module, _, name = known.source.partition(":")
    package = import_module(module)
    on_cpu = next(model.parameters()).device.type == "cpu"
    options = {
        **known.preset,
        **dict(fields.optimizer_options),
        **known.fixed,
        **(known.on_cpu if on_cpu else {}),
    }
    kwargs: dict[str, Any] = {k: v for k, v in options.items() if k not in known.low_rank}
    kwargs["lr"] = rate
    if known.constant_rate and name != "RAdamScheduleFree":
        kwargs["warmup_steps"] = warmup_steps
    if fields.optimizer == "muon" or known.low_rank:
        special = {"muon": True} if fields.optimizer == "muon" else {n: options[n] for n in known.low_rank}
        kwargs["params"] = _groups(model, frozenset(decayed), fields.weight_decay, special)
    if known.low_rank:
        _let_restore(known)
    made: type[torch.optim.Optimizer] = getattr(package, name)
    return made, kwargs


def _groups(
    model: nn.Module, decayed: frozenset[str], weight_decay: float, special: dict[str, Any]
) -> list[dict[str, Any]]:
    """Groups of parameters: matrices in blocks, which have what is ``special``, and others."""
    blocks = tuple(f"{name}." for name in anatomy_of(model).blocks)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() == 2 and name.startswith(blocks)
            groups.setdefault((matrix, name in decayed), []).append(parameter)
    return [
        {"params": some, "weight_decay": weight_decay if decays else 0.0, **(special if matrix else {})}
        for (matrix, decays), some in groups.items()
    ]


def _let_restore(known: Known) -> None:
    """Let a checkpoint be read whose optimiser state has the projectors of such a package in it."""
    names = ("galore_projector", "svd_projector", "random_projector")
    for name in names:
        try:
            module = import_module(f"{known.package}.{name}")
        except ModuleNotFoundError:
            continue
        kinds: list[Any] = [v for v in vars(module).values() if isinstance(v, type)]
        torch.serialization.add_safe_globals(kinds)


def bare(optimizer: Any) -> Any:
    """The torch optimiser inside Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def settle_weights(optimizer: Any) -> None:
    """Have an optimiser that averages weights put the average into the model; the next step takes it out."""
    settle = getattr(bare(optimizer), "eval", None)
    if callable(settle):
        settle()
