"""How a sparse weight lies in a device's memory: a layout a file, each with the op that multiplies by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out
    from compresskit.kernels.packed.base import Layout

LAYOUTS: Registry[Layout] = Registry(
    "packed layout",
    {
        "dense": "compresskit.kernels.packed.dense:Dense",
        "bitmap": "compresskit.kernels.packed.bitmap:BitmapRows",
        "two_four": "compresskit.kernels.packed.two_four:TwoFour",
        "block": "compresskit.kernels.packed.block:Block",
        "fragment": "compresskit.kernels.packed.fragment:Fragment",
        "gap": "compresskit.kernels.packed.gap:Gap",
        "tile": "compresskit.kernels.packed.tile:Tile",
    },
)
