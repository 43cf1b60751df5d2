"""Pruning: which weights become zero. One file per method; these tables are the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.sparse.base import Allocation, Pruner, Recovery, StructuredPruner, TrainedPruner

PRUNERS: Registry[Pruner] = Registry(
    "pruner",
    {
        "magnitude": "compresskit.sparse.magnitude:Magnitude",
        "wanda": "compresskit.sparse.wanda:Wanda",
        "sparsegpt": "compresskit.sparse.sparsegpt:SparseGPT",
        "alps": "compresskit.sparse.alps:Alps",
    },
)

# Methods that take layers, neurons, heads or channels away: the result is smaller and has no zeros to keep.
STRUCTURED_PRUNERS: Registry[StructuredPruner] = Registry(
    "structured pruner",
    {
        "cut": "compresskit.sparse.structured.cut:Cut",
    },
)

# How many zeros each layer gets of those that an unstructured pattern asks of all of them.
ALLOCATIONS: Registry[Allocation] = Registry(
    "allocation",
    {
        "uniform": "compresskit.sparse.allocation.uniform:Uniform",
        "global": "compresskit.sparse.allocation.overall:Overall",
        "owl": "compresskit.sparse.allocation.owl:Owl",
        "sensitivity": "compresskit.sparse.allocation.sensitivity:Sensitivity",
    },
)

# What may follow at once upon pruning a component of a block.
RECOVERIES: Registry[Recovery] = Registry(
    "recovery",
    {
        "reconstruct": "compresskit.sparse.recover.reconstruct:Reconstruct",
    },
)

# Methods that make zeros while the model trains, or move them; for the stage `sparse_train`.
TRAINED_PRUNERS: Registry[TrainedPruner] = Registry(
    "trained pruner",
    {
        "gradual": "compresskit.sparse.gradual:Gradual",
        "set": "compresskit.sparse.set:SET",
        "rigl": "compresskit.sparse.rigl:RigL",
        "srste": "compresskit.sparse.srste:SRSTE",
        "movement": "compresskit.sparse.movement:Movement",
        "maskllm": "compresskit.sparse.maskllm:MaskLLM",
    },
)
