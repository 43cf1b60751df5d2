"""Teachers with another tokenizer. One way to compare a file; this table is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.distill.align.base import Alignment

ALIGNMENTS: Registry[Alignment] = Registry(
    "alignment",
    {
        "spans": "compresskit.distill.align.spans:Spans",
        "uld": "compresskit.distill.align.sorted:Sorted",
    },
)
