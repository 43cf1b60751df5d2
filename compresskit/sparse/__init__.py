"""Pruning: which weights become zero. One file per method; this table is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.sparse.base import Pruner

PRUNERS: Registry[Pruner] = Registry(
    "pruner",
    {
        "magnitude": "compresskit.sparse.magnitude:Magnitude",
        "wanda": "compresskit.sparse.wanda:Wanda",
    },
)
