"""Safetensors files read and written one tensor at a time, in plain file operations.

Reading through a memory map would count every page touched as resident memory until the map is closed;
reading exact byte ranges keeps a 13 GB model out of a 3 GB process. Writing streams each tensor to the
file as it is made, so the largest thing alive is one tensor, and the bytes depend on nothing but the tensors.

Layout of a file: eight bytes little-endian header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from compresskit.errors import Fault, ModelError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
COPY_BYTES = 1 << 20
LFS_POINTER = b"version https://git-lfs"
FETCH_AGAIN = "Download or copy the file again; it is damaged."


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: ``num_bytes`` at ``offset`` of ``path``."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own.

        Raises:
            ModelError: the file has become shorter than its header says.
        """
        flat = torch.empty(self.num_bytes, dtype=torch.uint8, device="cpu")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            _fill(file.readinto, flat.numpy().data, self.path, self.key)
        return flat.view(self.dtype).reshape(self.shape)

    def rows(self, start: int, count: int) -> Stored:
        """Where these rows lie, counted along the first dimension."""
        row = self.num_bytes // max(self.shape[0], 1)
        shape = (count, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row, num_bytes=count * row)

    def same(self, other: Stored) -> bool:
        """Whether ``other`` holds the very same bytes, type and shape; neither is read whole."""
        if (self.dtype, self.shape, self.num_bytes) != (other.dtype, other.shape, other.num_bytes):
            return False
        with self.path.open("rb") as mine, other.path.open("rb") as others:
            mine.seek(self.offset)
            others.seek(other.offset)
            for done in range(0, self.num_bytes, COPY_BYTES):
                size = min(COPY_BYTES, self.num_bytes - done)
                if mine.read(size) != others.read(size):
                    return False
        return True


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor to be written: its header entry now, its bytes when ``make`` is called."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by key; reads the header only.

    Args:
        path: of the file.

    Returns:
        Key -> place, in file order.

    Raises:
        ModelError: no safetensors file, or its size differs from what its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER[:8]:
            raise ModelError(
                Fault(
                    str(path), "a safetensors file", "a Git LFS pointer to one", "Run `git lfs pull` there."
                )
            )
        length = int.from_bytes(start, "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, "a safetensors header", f"{size} bytes that do not start with one")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        places = [_place(path, key, entry, 8 + length) for key, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "a safetensors header", f"one that cannot be read ({error})") from error
    for place in places:
        item = torch.empty((), dtype=place.dtype).element_size()
        if place.num_bytes != prod(place.shape) * item:
            raise _damaged(
                path, f"{prod(place.shape) * item} bytes for {place.key}", f"{place.num_bytes} bytes"
            )
    places.sort(key=lambda p: (p.offset, p.num_bytes))
    end = max((p.offset + p.num_bytes for p in places), default=8 + length)
    if size != end:
        raise _damaged(path, f"{end} bytes as its header says", f"{size} bytes")
    at = 0
    for place in places:  # one after another: none shares bytes with another
        begin = place.offset - 8 - length
        if begin != at:
            raise _damaged(path, f"{place.key} at byte {at} of its tensors", f"byte {begin}")
        at += place.num_bytes
    return {place.key: place for place in places}


def write_shard(path: Path, tensors: Sequence[Pending]) -> dict[str, Stored]:
    """Write ``tensors`` to ``path`` in the given order, whole or not at all.

    Args:
        path: of the file; replaced if it exists.
        tensors: each is made, written and forgotten before the next is made.

    Returns:
        Key -> its place in the new file.

    Raises:
        ValueError: a tensor is not what was announced.
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for pending in tensors:
        end = offset + prod(pending.shape) * torch.empty((), dtype=pending.dtype).element_size()
        header[pending.key] = {
            "dtype": NAMES[pending.dtype],
            "shape": list(pending.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map tensors straight from the file and want them aligned
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for pending in tensors:
            tensor = pending.make().detach().to("cpu").contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != (pending.dtype, pending.shape):
                raise ValueError(
                    f"{pending.key}: announced {pending.dtype} {pending.shape}, "
                    f"made {tensor.dtype} {tuple(tensor.shape)}"
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    base = 8 + len(text)
    return {p.key: _place(path, p.key, cast(Mapping[str, Any], header[p.key]), base) for p in tensors}


def write_stream(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> tuple[tuple[str, ...], int]:
    """Write ``tensors`` to ``path`` as they come, whole or not at all, none kept after it was written.

    Tensors of the widest numbers come first, so that each is aligned for readers that map the file; the
    bytes wait in a file for each width until all have come and the header can be written.

    Args:
        path: of the file; replaced if it exists.
        tensors: (key, tensor); each is forgotten before the next is asked for.
        metadata: what the header says besides.

    Returns:
        The keys, in the order they came, and the bytes of all tensors.

    Raises:
        OSError: it cannot be written.
    """
    waiting: dict[int, IO[bytes]] = {}
    entries: dict[int, list[tuple[str, torch.dtype, list[int], int]]] = {}
    with ExitStack() as files:
        for key, tensor in tensors:
            width = tensor.element_size()
            if width not in waiting:
                waiting[width] = files.enter_context(tempfile.TemporaryFile(dir=path.parent))
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
            waiting[width].write(data)
            entries.setdefault(width, []).append((key, tensor.dtype, list(tensor.shape), len(data)))
            del tensor, data
        widths = sorted(waiting, reverse=True)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for key, dtype, shape, size in (entry for width in widths for entry in entries[width]):
            header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for width in widths:
                waiting[width].seek(0)
                shutil.copyfileobj(waiting[width], file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return tuple(key for width in widths for key, *_ in entries[width]), offset


def _place(path: Path, key: str, entry: Mapping[str, Any], base: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape, name = tuple(entry["shape"]), str(entry["dtype"])
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{key} has no whole numbers for its shape and offsets")
    if name not in DTYPES:
        raise ValueError(f"{key} has the unknown type {name}")
    return Stored(path, key, DTYPES[name], shape, base + begin, end - begin)


def _fill(readinto: Callable[[memoryview], int | None], view: memoryview, path: Path, key: str) -> None:
    """Fill ``view``; one read returns at most 2 GiB on Linux."""
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            raise _damaged(path, f"{len(view)} bytes for {key}", f"the end of the file after {done}")
        done += count


def _damaged(path: Path, expected: str, got: str) -> ModelError:
    return ModelError(Fault(str(path), expected, got, FETCH_AGAIN))
