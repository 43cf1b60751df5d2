"""How tensors lie on disk: the grids between stages, and the packed checkpoint at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.formats.base import Checkpoint, Format

FORMATS: Registry[Format] = Registry(
    "format",
    {
        "compressed-tensors": "compresskit.formats.compressed_tensors:CompressedTensors",
        "bitsandbytes": "compresskit.formats.bitsandbytes:Bitsandbytes",
        "compresskit-bitmask": "compresskit.formats.bitmask:Bitmask",
    },
)


def export(model: Checkpoint, out: Path) -> int:
    """Write ``model`` into the directory ``out`` as its users will load it; see formats.checkpoint."""
    from compresskit.formats.checkpoint import export_checkpoint

    return export_checkpoint(model, out)
