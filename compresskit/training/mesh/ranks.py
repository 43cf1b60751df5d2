"""One mesh of all ranks: which of them copy, shard and split a model, and what they call it.

Neighbours split layers, since they talk most; then come the ranks that shard, then the copies.

Papers: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023,
https://arxiv.org/abs/2304.11277 (hybrid sharding); see ``compresskit.training.mesh.split`` for layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from compresskit.modeling.anatomy import anatomy_of
from compresskit.training.mesh.split import split
from compresskit.training.setting import Setting

COPY, SHARD, TENSOR = "copy", "shard", "tensor"


def mesh_of(setting: Setting) -> DeviceMesh:
    """The mesh of ``setting``; dimensions of one rank are left out. A collective."""
    fields = setting.fields
    shards = setting.processes // (fields.replicas * fields.tensor_parallel)
    sizes = {COPY: fields.replicas, SHARD: shards, TENSOR: fields.tensor_parallel}
    used = {name: size for name, size in sizes.items() if size > 1}
    return init_device_mesh(setting.device, tuple(used.values()), mesh_dim_names=tuple(used))


def place(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep of ``model`` what is this rank's part in ``mesh``, in place; a collective.

    Args:
        model: of transformers, whole and the same on all ranks, on the device of ``mesh``.
        mesh: from :func:`mesh_of`.

    Raises:
        EngineError: its layers cannot be split.
    """
    # It tells, at the end of each run, that a weight in parts of parts is gathered in two steps.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    names = mesh.mesh_dim_names or ()
    anatomy = anatomy_of(model)
    if TENSOR in names:
        split(model, mesh[TENSOR])
    if SHARD not in names:
        return
    among = mesh[COPY, SHARD] if COPY in names else mesh[SHARD]
    again = {name for group in anatomy.tied for name in group}
    ends = [name for name in (anatomy.embeddings, anatomy.head) if name and f"{name}.weight" not in again]
    for name in (*anatomy.blocks, *ends):
        fully_shard(model.get_submodule(name), mesh=among, reshard_after_forward=True)
    root = fully_shard(model, mesh=among, reshard_after_forward=False)
    # Accelerate looks for this name where gradients are to be added up before ranks exchange them.
    model.no_sync = partial(_apart, root)  # type: ignore[assignment]


@contextmanager
def _apart(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def mesh_name(model: nn.Module) -> str | None:
    """What ranks do with ``model``: ``fsdp 2 x 2`` (copies, shards), ``tp 2``, ``fsdp 2 x tp 2``; else None.

    By where its parameters really are; :func:`place` names the dimensions.
    """
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            mesh: Any = parameter.device_mesh
            sizes |= dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    if not {COPY, TENSOR} & sizes.keys():
        return None
    shards = [str(sizes[name]) for name in (COPY, SHARD) if name in sizes]
    said = [f"fsdp {' x '.join(shards)}"] if shards else []
    return " x ".join([*said, *([f"tp {sizes[TENSOR]}"] if TENSOR in sizes else [])])


def asked_name(setting: Setting) -> str:
    """What :func:`mesh_name` is to say under ``setting``."""
    fields = setting.fields
    copies, ways = fields.replicas, fields.tensor_parallel
    shards = setting.processes // (copies * ways)
    said = [] if shards == 1 else [f"fsdp {copies} x {shards}" if copies > 1 else f"fsdp {shards}"]
    return " x ".join([*said, *([f"tp {ways}"] if ways > 1 else [])])
