"""Where a teacher lives while its student trains. One placement a file; this table is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.distill.placements.base import Placement

PLACEMENTS: Registry[Placement] = Registry(
    "teacher placement",
    {
        "replicate": "compresskit.distill.placements.replicate:Replicate",
        "shard": "compresskit.distill.placements.shard:Shard",
        "8bit": "compresskit.distill.placements.few_bits:EightBit",
        "4bit": "compresskit.distill.placements.few_bits:FourBit",
        "cache": "compresskit.distill.placements.cache:Cache",
        "server": "compresskit.distill.placements.server:Server",
    },
)
