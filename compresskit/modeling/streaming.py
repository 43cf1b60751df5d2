"""A model with one block in memory: the rest on the meta device, changes written shard by shard.

A block's weights are read when it is entered, written to its own output shard when it is left, and dropped.
Of what is outside the blocks the two tables, token embedding and head, are in memory only within
:meth:`StreamedModel.table`; the rest (norms, positions) is small and stays. Tensors that nobody changed are
written with the bytes they had, whatever dtype was computed in.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError, OutputError, RunError
from compresskit.formats.shards import Pending, Stored, write_shard
from compresskit.modeling.anatomy import Anatomy
from compresskit.modeling.checkpoint import INDEX, SINGLE
from compresskit.modeling.fetch import copy_sidecars
from compresskit.modeling.packed import packed_fault
from compresskit.modeling.skeleton import resolve_device, resolve_dtype, skeleton
from compresskit.modeling.source import GRIDS, ModelSource, is_finite


class StreamedModel:
    """``source`` as a module of which one block at a time is in memory, and its next version in ``out``.

    Use as a context manager, or call :meth:`close` at the end; without it ``out`` is no complete model.

    Args:
        source: the checkpoint to read; not packed.
        out: an existing directory to write to; None where nothing is changed and nothing written.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``; where blocks are computed.
        dtype: ``auto`` (what the configuration says), ``float32``, ``bfloat16`` or ``float16``: the dtype to
            compute in. Weights are written in the dtype they are stored in.

    Attributes:
        module: the whole model in evaluation mode; weights that are not in memory are on meta.
        device: of everything that is not on meta.
        tables: names of the modules :meth:`table` takes: token embedding and head.

    Raises:
        ModelError: ``source`` is packed or has weights that cannot be read.
        OutputError: ``out`` is the source's own directory, or not there.
    """

    def __init__(
        self, source: ModelSource, out: str | Path | None, device: str = "cpu", dtype: str = "auto"
    ) -> None:
        self.source, self.out = source, None if out is None else Path(out)
        _require_places(source, self.out)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype) or source.compute_dtype
        self.module = skeleton(source, dtype=self.dtype)
        self.blocks = source.anatomy.blocks
        self._names: dict[str | None, list[str]] = {None: []}
        for name in source.names():
            self._names.setdefault(source.anatomy.block_of(name), []).append(name)
        self._entered: str | None = None
        self._written: dict[str, Stored] = {}
        # Set only where the stored dtype differs from the one computed in, which would round it.
        self._exact: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self.tables = _tables(self.module, source.anatomy)
        large = {self._stored_name(f"{table}.weight") for table in self.tables}
        fill_buffers(self.module, self.device)
        self._load([name for name in self._names[None] if name not in large])
        self.module.requires_grad_(False)

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights in memory; what it holds at the end is written to its shard.

        Yields:
            The block's module. Change weights with :meth:`set_weight` or in place.

        Raises:
            RuntimeError: another block is entered.
        """
        if self._entered is not None:
            raise RuntimeError(f"{self._entered} is in memory; leave it first")
        name = self.blocks[index]
        names = self._names.get(name, [])
        self._entered = name
        try:
            self._load(names)
            yield self.module.get_submodule(name)
            self._write(self._shard(index + 1), names, self._current)
        finally:
            self._drop(names)
            self._entered = None
            return_memory()

    @contextmanager
    def table(self, name: str) -> Iterator[nn.Module]:
        """Module ``name`` of :attr:`tables` with its weight in memory, that of modules tied to it included.

        Change it with :meth:`set_weight` only; one that was changed stays in memory until it is written.

        Yields:
            The module.
        """
        weight = self._stored_name(f"{name}.weight")
        here = not self.module.get_parameter(weight).is_meta
        try:
            if not here:
                self._load([weight])
            yield self.module.get_submodule(name)
        finally:
            if not here and weight not in self._changed:
                self._drop([weight])

    def weight_OI(self, layer: str) -> Tensor:
        """The weight (O, I) of ``layer`` as it will be written, in its stored dtype, on the model's device.

        It may be the very tensor that is computed with: do not change it. It stays as it is when
        :meth:`set_weight` replaces it.

        Raises:
            RuntimeError: the layer's block or table is not entered.
        """
        name = f"{layer}.weight"
        self._require_resident(name)
        weight = self._current(name).to(self.device)
        return weight.t().contiguous() if self.source.anatomy.linears[layer].transposed else weight

    def set_weight(self, layer: str, weight_OI: Tensor) -> None:
        """Replace the weight of linear layer ``layer``; these very values will be written.

        Args:
            layer: outside the blocks, or in the block that is entered.
            weight_OI: (O, I), finite, in the layer's stored dtype or one that converts to it. The model may
                keep it without a copy: do not change it afterwards.

        Raises:
            ModelError: another shape, values that are not finite, or a weight tied to another module's.
            RuntimeError: the layer's block or table is not entered.
        """
        linear = self.source.anatomy.linears[layer]
        self._require_resident(f"{layer}.weight")
        if linear.tied:
            got = "a weight shared with another module"
            raise ModelError(Fault(layer, "a weight of its own", got, f"Add {layer} to ignore."))
        shape = (linear.out_features, linear.in_features)
        _require_sound(layer, weight_OI, shape)
        self._set(f"{layer}.weight", weight_OI.detach().t() if linear.transposed else weight_OI.detach())

    def parameter(self, name: str) -> Tensor:
        """Parameter ``name`` as it will be written, in its stored dtype and shape, on the model's device.

        Raises:
            RuntimeError: its block is not entered.
        """
        self._require_resident(name)
        return self._current(name).to(self.device)

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter that is no linear layer's weight: of a norm, or a bias.

        Args:
            name: outside the blocks, or in the block that is entered.
            tensor: of its shape as stored, finite, in its stored dtype or one that converts to it.

        Raises:
            ModelError: another shape, values that are not finite, or a parameter tied to another.
            RuntimeError: its block is not entered.
        """
        self._require_resident(name)
        if any(name in group for group in self.source.anatomy.tied):
            got = "one shared with another module"
            raise ModelError(Fault(name, "a parameter of its own", got, "Leave it as it is."))
        _require_sound(name, tensor, tuple(self.module.get_parameter(name).shape))
        self._set(name, tensor.detach())

    def close(self) -> None:
        """Write everything not yet written, the index and the files beside the weights; config.json last."""
        if self.out is None:
            return
        total = len(self.blocks) + 1
        for index, block in enumerate(self.blocks):
            names = self._names.get(block, [])
            if not any(name in self._written for name in names):
                self._write(self._shard(index + 1), names, self.source.tensor)
        self._write(self._shard(0), self._names[None], self._current)
        if total > 1:
            self._write_index(self.out)
        if (self.source.directory / GRIDS).is_file() and not (self.out / GRIDS).exists():
            _publish(self.out / GRIDS, (self.source.directory / GRIDS).read_bytes())
        copy_sidecars(self.source.directory, self.out)

    @property
    def resident_bytes(self) -> int:
        """Of parameters and buffers that are not on meta; tied ones counted once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)

    def _shard(self, number: int) -> str:
        """Shard 0 holds what is outside the blocks, shard i + 1 block i."""
        total = len(self.blocks) + 1
        return SINGLE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def _set(self, name: str, value: Tensor) -> None:
        exact = value.to(self.device, self.source.dtype(name)).contiguous()
        assign(self.module, name, exact.to(self.dtype))
        self._changed.add(name)
        if exact.dtype != self.dtype:
            self._exact[name] = exact.to("cpu", copy=True)

    def _stored_name(self, name: str) -> str:
        """``name``, or the name that the parameter it is tied to is stored under."""
        return next((group[0] for group in self.source.anatomy.tied if name in group), name)

    def _require_resident(self, name: str) -> None:
        if self.module.get_parameter(name).is_meta:
            raise RuntimeError(f"{name} is not in memory; enter its block or table first")

    def _load(self, names: list[str]) -> None:
        for name in names:
            tensor = self._written[name].read() if name in self._written else self.source.tensor(name)
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            assign(self.module, name, tensor.to(self.device, dtype))

    def _drop(self, names: list[str]) -> None:
        for name in names:
            assign(self.module, name, torch.empty_like(_tensor(self.module, name), device="meta"))
            self._exact.pop(name, None)

    def _current(self, name: str) -> Tensor:
        """The tensor to write for ``name``, in its stored dtype; as read where nobody changed it."""
        now = _tensor(self.module, name).detach()
        if now.is_meta:
            return self.source.tensor(name)
        if now.dtype == self.source.dtype(name):
            return now
        exact = self._exact.get(name)
        if exact is not None and _same_bits(exact.to(self.device, now.dtype), now):
            return exact
        stored = self._place(name).read()
        return stored if _same_bits(stored.to(self.device, now.dtype), now) else now.to("cpu", stored.dtype)

    def _place(self, name: str) -> Stored:
        return self._written.get(name) or self.source.place(name)

    def _write(self, shard: str, names: list[str], make: Callable[[str], Tensor]) -> None:
        if self.out is None:
            return
        path = self.out / shard
        pending = [Pending(n, self.source.dtype(n), self.source.shape(n), partial(make, n)) for n in names]
        try:
            self._written |= write_shard(path, pending)
        except OSError as error:
            cure = "Free space on the disk, or choose another output directory."
            raise RunError(Fault(str(path), "room to write a shard", str(error), cure)) from error

    def _write_index(self, out: Path) -> None:
        shards = {None: self._shard(0)} | {b: self._shard(i + 1) for i, b in enumerate(self.blocks)}
        files = {name: shards[block] for block, names in self._names.items() for name in names}
        total = sum(self.source.place(name).num_bytes for name in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        _publish(out / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _tables(module: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    embeddings = anatomy.embeddings
    is_plain = embeddings is not None and isinstance(module.get_submodule(embeddings), nn.Embedding)
    return tuple(name for name in (embeddings if is_plain else None, anatomy.head) if name)


def fill_buffers(module: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies, masks), as from_pretrained does."""
    for part in module.modules():
        unsaved = [name for name in part._non_persistent_buffers_set if part._buffers.get(name) is not None]
        if not unsaved:
            continue
        for name in unsaved:
            part._buffers[name] = torch.empty_like(part._buffers[name], device=device)  # type: ignore[arg-type]
        with torch.no_grad():
            module._init_weights(part)  # type: ignore[operator]


def _tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``."""
    parent, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(parent), leaf)
    return found


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace parameter or buffer ``name`` by ``value`` wherever it stands, tied places included."""
    old = _tensor(module, name)
    is_parameter = isinstance(old, nn.Parameter)
    new = nn.Parameter(value, requires_grad=False) if is_parameter else value
    for part in module.modules():
        held = part._parameters if is_parameter else part._buffers
        for leaf, tensor in held.items():
            if tensor is old:
                held[leaf] = new  # type: ignore[assignment]


def return_memory() -> None:
    """Give freed pages back; glibc keeps those of tensors below 32 MB, more of them after each layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _require_sound(where: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """A new value for ``where`` has its shape and is finite."""
    if tuple(value.shape) != shape:
        cure = "Return a weight of the shape given."
        raise ModelError(Fault(where, f"a weight of shape {shape}", f"{tuple(value.shape)}", cure))
    if not is_finite(value):
        cure = "Use another method or more calibration data; this one failed on this layer."
        raise ModelError(Fault(where, "finite weights", "NaN or infinity", cure))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the sign of zero."""
    if not torch.equal(one, other):
        return False
    return not one.is_floating_point() or torch.equal(one.signbit(), other.signbit())


def _publish(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _require_places(source: ModelSource, out: Path | None) -> None:
    if source.is_compressed:
        raise ModelError(packed_fault(source, "model"))
    if out is None:
        return
    if not out.is_dir():
        raise OutputError(Fault(str(out), "an existing directory", "none", "Create it first."))
    if out.resolve() == source.directory.resolve():
        raise OutputError(Fault(str(out), "another directory", "the model's own", "Choose another output."))
