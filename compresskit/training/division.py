"""A frozen model of which each rank keeps an equal share, beside any engine that trains another one.

torch's FSDP2 gathers a block's weights when the block is called and lets go of them after it. Every rank
reads from the checkpoint the rows of each tensor that it keeps, and no others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling import ModelSource
from compresskit.modeling.skeleton import skeleton
from compresskit.modeling.source import is_finite
from compresskit.modeling.streaming import assign, fill_buffers


def divided(
    source: ModelSource, device: torch.device, dtype: torch.dtype, *, offload: bool = False
) -> nn.Module:
    """The model of ``source`` with its parameters divided among all ranks; a collective.

    Args:
        source: a checkpoint that is not packed; a causal language model.
        device: of this rank.
        dtype: of the parameters.
        offload: whether each rank keeps its share on the CPU, and ``device`` has what is gathered alone.

    Returns:
        The module in evaluation mode; nothing takes a gradient. Call its ``base_model``, or a block; what is
        outside of that, such as the output projection, is only to be had by :func:`whole`.

    Raises:
        ModelError: a weight is not finite.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    model: Any = skeleton(source, dtype=dtype)
    fill_buffers(model, device)
    model.requires_grad_(False).eval()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    pinned = device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for name in source.anatomy.blocks:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    for group in source.anatomy.tied:  # sharding parted what is outside of base_model from what is inside
        _tie(model, group)
    for name in source.names():
        _fill(model, name, source, device, dtype, mesh, kept=torch.device("cpu") if offload else device)
    return model  # type: ignore[no-any-return]


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter from :func:`divided`, for as long as the caller keeps it; a collective."""
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter.detach()
    mesh, local = sharded.device_mesh, sharded.to_local()
    if local.device.type != mesh.device_type:  # kept on the CPU; ranks exchange what is on the device
        form = {"shape": sharded.shape, "stride": sharded.stride()}
        there = local.to(mesh.device_type)
        sharded = DTensor.from_local(there, mesh, sharded.placements, run_check=False, **form)
    full: Tensor = sharded.full_tensor()
    return full


def _tie(model: nn.Module, names: tuple[str, ...]) -> None:
    """One parameter under all of ``names``: the one that is sharded, where there is one."""
    found = [model.get_parameter(name) for name in names]
    kept = next((p for p in found if hasattr(p, "to_local")), found[0])
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = kept


def _fill(
    model: nn.Module,
    name: str,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Any,
    *,
    kept: torch.device,
) -> None:
    """Read this rank's rows of ``name`` into ``model``, where shares are ``kept``; a buffer whole."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Along

    place = source.place(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        buffer = source.tensor(name)
        assign(model, name, buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype))
        return
    shape = parameters[name].shape
    each = -(-shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * each, shape[0])
    count = min(each, shape[0] - start)
    part = place.rows(start, count).read()
    if part.numel() and not is_finite(part):
        cure = "Fetch the checkpoint again; if it was trained so, go back to an earlier one."
        raise ModelError(Fault(f"{place.path}: {place.key}", "finite weights", "NaN or infinite ones", cure))
    stride = torch.empty(shape, device="meta").stride()
    local = part.to(kept, dtype)
    made = DTensor.from_local(local, mesh, [Along(0)], run_check=False, shape=shape, stride=stride)
    assign(model, name, made)
