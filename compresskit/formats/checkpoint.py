"""A finished checkpoint on disk, as its users load it: packed where there are grids, else as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from compresskit.formats import FORMATS
from compresskit.formats.base import CONFIG, Checkpoint
from compresskit.formats.grid import GRIDS_FILE, Grid
from compresskit.formats.readback import read_back
from compresskit.formats.shards import write_stream
from compresskit.progress import Progress

ADAPTER = "adapter"
"""Directory of a trained adapter, beside the model that it is for."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
WEIGHTS = (".safetensors", INDEX, ".bin", ".pt", ".pth", ".h5", ".gguf", ".msgpack", ".onnx")


def export_checkpoint(model: Checkpoint, out: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write ``model`` into ``out`` in a form that plain ``from_pretrained`` loads.

    Layers with a grid are packed (see :func:`format_for`); a model without any is copied. At most one tensor
    is in memory; the bytes depend on the model alone.

    Args:
        model: a dense checkpoint, its quantised weights on their grids.
        out: an existing directory.
        shard_bytes: tensors of at most so many bytes go into one file.

    Returns:
        How many parameters were packed and read back; 0 where nothing is packed.

    Raises:
        FormatError: a quantised weight does not lie on its grid, or does not read back.
    """
    grids = grids_of(model)
    for path in sorted(model.directory.iterdir()):
        if path.is_file() and _belongs(path.name, is_packed=bool(grids)):
            shutil.copyfile(path, out / path.name)
    if (model.directory / ADAPTER).is_dir():
        shutil.copytree(model.directory / ADAPTER, out / ADAPTER)
    return pack(model, out, format_for(grids), shard_bytes=shard_bytes) if grids else 0


def pack(model: Checkpoint, out: Path, form: str, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the weights of ``model`` into ``out``, those on grids packed, and read everything back.

    Args:
        model: dense, its quantised weights on their grids.
        out: has the model's config.json, which is changed to say how weights are packed.
        form: a name of :data:`compresskit.formats.FORMATS`.
        shard_bytes: tensors of at most so many bytes go into one file.

    Returns:
        How many parameters were read back.

    Raises:
        FormatError: a quantised weight does not lie on its grid, or a parameter does not read back.
    """
    packer, grids = FORMATS[form](), grids_of(model)
    names = model.names()
    with Progress("packing", len(names), unit="tensors") as progress:
        encoded = packer.encode(_read(model, names, progress), grids)
        write_shards(out, encoded, shard_bytes=shard_bytes)
    set_quantization(out, packer.config(grids, [n for n in model.anatomy.linears if n not in grids]))
    return read_back(model, out)


def grids_of(model: Checkpoint) -> dict[str, Grid]:
    """The grid of every layer of ``model`` that has one."""
    return {layer: grid for layer in model.anatomy.linears if (grid := model.grid(layer)) is not None}


def set_quantization(out: Path, packing: object | None) -> None:
    """Write ``packing`` into config.json of ``out`` as its ``quantization_config``; None takes it away."""
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if packing is not None:
        config["quantization_config"] = packing
    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def format_for(grids: Mapping[str, Grid]) -> str:
    """The format that holds such grids: ``bitsandbytes`` for nf4, else ``compressed-tensors``."""
    is_nf4 = any(grid.number == "nf4" for grid in grids.values())
    return "bitsandbytes" if is_nf4 else "compressed-tensors"


def write_shards(
    out: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``tensors`` into one safetensors file, or several and an index.

    Args:
        out: an existing directory.
        tensors: (key, tensor); read one at a time.
        shard_bytes: start another file before this is exceeded.
        metadata: what the header of every file says besides.
    """
    parts: list[tuple[Path, tuple[str, ...]]] = []
    total = 0
    for index, shard in enumerate(_shards(tensors, shard_bytes)):
        path = out / f".{index}.safetensors.partial"
        keys, size = write_stream(path, shard, {"format": "pt", **(metadata or {})})
        parts.append((path, keys))
        total += size
    if len(parts) == 1:
        parts[0][0].rename(out / SINGLE)
        return
    places = {}
    for index, (path, keys) in enumerate(parts, 1):
        name = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        path.rename(out / name)
        places.update(dict.fromkeys(keys, name))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
    (out / INDEX).write_text(text + "\n", encoding="utf-8")


def _belongs(name: str, *, is_packed: bool) -> bool:
    """Whether a file of the source goes into the export as it is."""
    if name.startswith(".") or name == GRIDS_FILE:
        return False
    return not name.endswith(WEIGHTS) or (not is_packed and name.endswith((".safetensors", INDEX)))


def _read(model: Checkpoint, names: Iterable[str], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, model.tensor(name)
        progress.advance()


def _shards(
    tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The tensors of one file after another; each to be used up before the next is asked for."""
    source = iter(tensors)
    ahead = list(islice(source, 1))

    def shard() -> Iterator[tuple[str, Tensor]]:
        size = 0
        while ahead and (size == 0 or size + _bytes(ahead[0][1]) <= shard_bytes):
            size += _bytes(ahead[0][1])
            yield ahead.pop()
            ahead.extend(islice(source, 1))

    while ahead:
        yield shard()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * torch.empty((), dtype=tensor.dtype).element_size()
