"""Put what another engine wrote of a run into the engine that goes on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from compresskit.errors import EngineError, Fault
from compresskit.training.access import Mirrored, ParamAccess, Partitioned
from compresskit.training.portable.sources import Source, is_of_each


@torch.no_grad()
def take_over(source: Source, model: nn.Module, optimizer: Any, access: ParamAccess) -> None:
    """Give ``model`` and ``optimizer`` the weights and states of ``source``; a collective.

    Args:
        source: of the same run.
        model: bare, prepared by the engine; what takes no gradient in it is as it was loaded.
        optimizer: of torch, that has not stepped.
        access: to the parameters.

    Raises:
        EngineError: ``source`` lacks a parameter, or has a state that is no number for each weight.
    """
    for names, parameter, shape in _trained(model):
        _write(parameter, _weight(source, names, shape), access)
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        found = source.tensor(name, buffer.shape) if name in kept else None
        if found is not None:
            buffer.copy_(found)
    if isinstance(access, Partitioned | Mirrored):
        _fill_flat(source, model, optimizer, access)
    else:
        _fill(source, model, optimizer)


def go_on(schedule: Any, saved: Mapping[str, Any], optimizer: Any) -> None:
    """Give ``schedule`` the step it was ``saved`` at, and ``optimizer`` its rate.

    All groups have one rate; engines differ in how many groups there are.
    """
    rate = saved["_last_lr"][0]
    own = schedule.state_dict()
    steps = {name: saved[name] for name in ("last_epoch", "_step_count")}
    schedule.load_state_dict({**own, **steps, "_last_lr": [rate] * len(own["_last_lr"])})
    for group in optimizer.param_groups:
        group["lr"] = rate


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters of ``optimizer`` in its order; none under DeepSpeed, which has flat ones."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [names[p] for p in order] if all(p in names for p in order) else []


def _trained(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter, torch.Size]]:
    """What training changes: every name of it, the one it is stepped by first, and its whole shape."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, some in names.items():
        if parameter.requires_grad:
            yield some, parameter, torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _weight(source: Source, names: Sequence[str], shape: torch.Size) -> Tensor:
    """The weight that ``source`` has by one of its ``names``."""
    found = next((t for name in names if (t := source.tensor(name, shape)) is not None), None)
    if found is None or found.shape != shape:
        cure = "Remove the directory, or train with the versions it was begun with."
        got = "none" if found is None else str(tuple(found.shape))
        raise EngineError(Fault(f"the checkpoint's {names[0]}", str(tuple(shape)), got, cure))
    return found


def _states(source: Source, name: str, shape: torch.Size) -> dict[str, Any]:
    states = source.states(name, shape)
    for key, value in states.items():
        if is_of_each(key, value) and (type(value), value.shape) != (Tensor, shape):
            cure = "Go back to the strategy and processes it was written by, or choose another directory."
            got = f"{type(value).__name__} {tuple(value.shape)}"
            raise EngineError(Fault(f"the checkpoint's {key} of {name}", str(tuple(shape)), got, cure))
    return states


def _write(parameter: nn.Parameter, whole: Tensor, access: ParamAccess) -> None:
    """Into the parameter, and the copy of it that is stepped."""
    if isinstance(access, Partitioned):
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)
        safe_set_local_fp32_param(parameter, access.part(parameter, whole))
        return
    _own(parameter).copy_(_own(_like(whole, parameter)))
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        mine = mapping.lp_fragment_address
        mapping.hp_fragment.detach().copy_(whole.flatten().narrow(0, mine.start, mine.numel))


def _fill(source: Source, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """States of an optimiser that steps the parameters themselves, whole or as DTensors."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {parameter: number for number, parameter in enumerate(order)}
    states = {}
    for (name, *_), parameter, shape in _trained(model):
        found = _states(source, name, shape)
        if found:
            own = {k: _like(v, parameter) if is_of_each(k, v) else v for k, v in found.items()}
            states[numbers[parameter]] = {k: deepcopy(v) for k, v in own.items()}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _fill_flat(source: Source, model: nn.Module, optimizer: Any, access: ParamAccess) -> None:
    """States of DeepSpeed's flat groups, which have not been stepped and so have none."""
    trained = list(_trained(model))
    flats: list[Tensor] = (
        trained[0][1]._z3_optimizer.fp32_partitioned_groups_flat  # type: ignore[attr-defined]
        if isinstance(access, Partitioned)
        else [group["params"][0] for group in optimizer.param_groups]
    )
    counts_there = any(optimizer.defaults.get(name) for name in ("fused", "capturable"))
    for (name, *_), parameter, shape in trained:
        for key, value in _states(source, name, shape).items():
            of_each = is_of_each(key, value)
            for flat in (flat for flat in flats if key not in optimizer.state[flat]):
                made = torch.zeros_like(flat) if of_each else deepcopy(value)
                optimizer.state[flat][key] = made.to(flat.device) if counts_there and not of_each else made
            if of_each:
                _set_flat(parameter, key, value, optimizer, access)


def _set_flat(parameter: Any, key: str, whole: Tensor, optimizer: Any, access: ParamAccess) -> None:
    """Write one state into this rank's part of a flat group."""
    if isinstance(access, Partitioned):
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, access.part(parameter, whole), key)
    elif parameter._hp_mapping is not None:
        mapping = parameter._hp_mapping
        mine, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
        state = optimizer.state[flat][key]
        state.narrow(0, place.start, place.numel).copy_(whole.flatten().narrow(0, mine.start, mine.numel))


def _like(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """``whole`` where and how ``parameter`` lies."""
    here = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return here
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _own(tensor: Tensor) -> Tensor:
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach()
