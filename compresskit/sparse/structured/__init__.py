"""Structured pruning: what is left is an ordinary, smaller model. One file per importance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.sparse.structured.base import Importance

IMPORTANCES: Registry[Importance] = Registry(
    "importance",
    {
        "magnitude": "compresskit.sparse.structured.magnitude:MagnitudeImportance",
        "activation": "compresskit.sparse.structured.activation:ActivationImportance",
        "fluctuation": "compresskit.sparse.structured.fluctuation:FluctuationImportance",
        "taylor": "compresskit.sparse.structured.taylor:TaylorImportance",
    },
)
