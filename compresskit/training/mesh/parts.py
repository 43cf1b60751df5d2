"""What a restart needs of a model in a mesh: each rank writes its own part, and reads it back to the byte.

It is read into the same mesh: for another one, or none, ``portable`` puts the parts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from compresskit.training.access import own_part, wanted
from compresskit.training.mesh.ranks import COPY

FORMAT = "part-{}.pt"
PART, SAME, WHOLE = "part", "same", "whole"
"""How a state lies: as its parameter does, the same on all ranks, or gathered for want of a simpler way."""


def save_part(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
    """Write what this rank keeps of ``model`` and ``optimizer``; of equal copies the first writes.

    Args:
        folder: exists; all ranks reach it.
        model: as ``compresskit.training.mesh.ranks.place`` left it; what takes no gradient is left out.
        optimizer: of torch.
        mesh: of all ranks.
    """
    states = {
        str(number): {name: _packed(value, parameter) for name, value in state.items()}
        for number, (parameter, state) in enumerate(_states(optimizer))
    }
    if _first_copy(mesh):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        kept = {"model": _own(model), "states": states, "groups": groups}
        torch.save(kept, folder / FORMAT.format(_place(mesh)))


def load_part(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> None:
    """Inverse of :func:`save_part`, into a model and an optimiser that were made alike."""
    kept = torch.load(folder / FORMAT.format(_place(mesh)), map_location="cpu", weights_only=True)
    for name, tensor in _own(model).items():
        tensor.copy_(kept["model"][name])
    for group, saved in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update(saved)
    for number, (parameter, _) in enumerate(_states(optimizer)):
        made = {name: _unpacked(packed, parameter) for name, packed in kept["states"][str(number)].items()}
        if made:
            optimizer.state[parameter] = made


def _own(model: nn.Module) -> dict[str, Tensor]:
    """This rank's part of all that training may change."""
    return {name: own_part(tensor) for name, tensor in wanted(model, frozen=False).items()}


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, Mapping[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, optimizer.state.get(parameter, {})


def _packed(value: Any, parameter: Tensor) -> tuple[str, str, Any]:
    """How ``value`` lies, the kind of device it is on, and what of it this rank writes."""
    device = value.device.type if isinstance(value, Tensor) else ""
    if not isinstance(value, DTensor):
        return SAME, device, value
    assert isinstance(parameter, DTensor)
    if (value.shape, value.placements) == (parameter.shape, parameter.placements):
        return PART, device, value.to_local()
    return WHOLE, device, value.full_tensor()


def _unpacked(packed: tuple[str, str, Any], parameter: Tensor) -> Any:
    how, device, value = packed
    if not isinstance(value, Tensor):
        return value
    value = value if device == "cpu" else value.to(parameter.device)
    if how == SAME:
        return value
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    if how == WHOLE:
        placements = (Replicate(),) * mesh.ndim
        return DTensor.from_local(value, mesh, placements, run_check=False)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)


def _first_copy(mesh: DeviceMesh) -> bool:
    return COPY not in (mesh.mesh_dim_names or ()) or mesh.get_local_rank(COPY) == 0


def _place(mesh: DeviceMesh) -> str:
    """Which part a rank has, whichever copy it is of."""
    names = [name for name in (mesh.mesh_dim_names or ()) if name != COPY]
    return "-".join(f"{name}{mesh.get_local_rank(name)}" for name in names)
