"""Pruning: which weights become zero. One file per method; these tables are the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.sparse.base import Pruner, StructuredPruner

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
