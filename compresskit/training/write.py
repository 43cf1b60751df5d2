"""A trained model's tensors as the next checkpoint directory.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from compresskit.formats.shards import Pending, write_shard
from compresskit.modeling import ModelSource, copy_sidecars
from compresskit.modeling.checkpoint import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000


class Changed(Mapping[str, Tensor]):
    """The tensors of a checkpoint, some of them made anew whenever they are asked for.

    Args:
        source: the checkpoint.
        make: what makes those that are other ones now, by their names.
    """

    def __init__(self, source: ModelSource, make: Mapping[str, Callable[[], Tensor]]) -> None:
        self._source, self._make = source, make

    def __getitem__(self, name: str) -> Tensor:
        make = self._make.get(name)
        return self._source.tensor(name) if make is None else make()

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.names())

    def __len__(self) -> int:
        return len(self._source.names())


def as_stored(source: ModelSource, layer: str, weight_OI: Tensor) -> Tensor:
    """The weight (O, I) of linear ``layer`` as its parameter has it, which may be (I, O)."""
    return weight_OI.t().contiguous() if source.anatomy.linears[layer].transposed else weight_OI


def write_checkpoint(source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` under the names of ``source``, and the files beside its weights; config.json last.

    Args:
        source: the checkpoint training started from; its stored dtypes are kept.
        out: an existing directory.
        tensors: the whole state dict; of tied parameters only the first is written.
    """
    groups: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name in source.names():
        size = source.place(name).num_bytes
        if groups[-1] and size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= size
    files: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        shard = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        pending = [
            Pending(n, source.dtype(n), source.shape(n), partial(_stored, source, tensors, n)) for n in names
        ]
        write_shard(out / shard, pending)
        files |= dict.fromkeys(names, shard)
    if len(groups) > 1:
        total = sum(source.place(name).num_bytes for name in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    copy_sidecars(source.directory, out)


def _stored(source: ModelSource, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name].to(source.dtype(name))
