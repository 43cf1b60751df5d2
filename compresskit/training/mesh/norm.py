"""The norm of gradients of which ranks have parts, some more of them than others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from compresskit.training.access import own_part


def mesh_key(tensor: Tensor) -> Hashable:
    """Tensors of different keys do not go into one fused operation."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all ranks is ``max_norm`` at most; a collective.

    Args:
        parameters: one that is not a DTensor has the same gradient on all ranks.
        max_norm: of all of them together.

    Returns:
        The norm before, the same on every rank.
    """
    groups: dict[tuple[Hashable, int], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault((mesh_key(parameter), _parts(parameter)), []).append(parameter)
    total: Tensor | None = None
    for (_, parts), group in groups.items():
        norm = get_total_norm([own_part(p.grad) for p in group if p.grad is not None]).float()
        # All ranks together have each number as often as there are ranks to one part.
        squares = norm.square() * (parts / dist.get_world_size())
        total = squares if total is None else total + squares
    assert total is not None
    dist.all_reduce(total)
    total = total.sqrt()
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total


def _parts(parameter: nn.Parameter) -> int:
    """In how many parts ``parameter`` lies, and its gradient from now on."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    gradient = parameter.grad
    # That of a dimension which ranks cannot divide evenly comes whole.
    if isinstance(gradient, DTensor) and gradient.placements != placements:
        parameter.grad = gradient.redistribute(placements=placements)
    return prod(mesh.size(i) for i, p in enumerate(placements) if not p.is_replicate())


def by_mesh(optimizer: torch.optim.Optimizer) -> None:
    """Divide the groups of ``optimizer`` so that none has parameters of two meshes."""
    groups = []
    for group in optimizer.param_groups:
        parts: dict[Hashable, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(mesh_key(parameter), []).append(parameter)
        groups += [{**group, "params": part} for part in parts.values()]
    optimizer.param_groups[:] = groups
