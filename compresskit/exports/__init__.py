"""What other runtimes load: one file per target; the source is any checkpoint of ours, packed or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.exports.base import Exporter

EXPORTS: Registry[Exporter] = Registry(
    "export target",
    {
        "gguf": "compresskit.exports.gguf:Gguf",
        "onnx": "compresskit.exports.onnx:Onnx",
        "torchao": "compresskit.exports.torchao:Torchao",
        "compressed-tensors": "compresskit.exports.plain:CompressedTensors",
        "bitsandbytes": "compresskit.exports.plain:Bitsandbytes",
        "bitmask": "compresskit.exports.bitmask:Bitmask",
        "dense": "compresskit.exports.plain:Dense",
    },
)


def runtimes_of(targets: Iterable[str]) -> tuple[str, ...]:
    """The runtimes that load what ``targets`` write; without any, those that load an artifact as it is."""
    named = tuple(targets) or ("dense",)
    return tuple(dict.fromkeys(runtime for to in named for runtime in EXPORTS[to].runtimes))
