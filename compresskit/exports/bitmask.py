"""A Hugging Face directory whose zeros take a bit each, for transformers where compresskit is imported.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compresskit.errors import Fault
from compresskit.exports.base import Prospect, layer_faults
from compresskit.exports.plain import tensors_of
from compresskit.formats.bitmask import TYPES, PackedLayer, layer_of
from compresskit.formats.bitmask import Bitmask as Format
from compresskit.formats.checkpoint import set_quantization, write_shards
from compresskit.formats.grid import Grid
from compresskit.formats.readback import read_back
from compresskit.formats.shards import Stored
from compresskit.modeling import Anatomy, Linear, ModelSource, copy_sidecars
from compresskit.modeling.checkpoint import listed
from compresskit.progress import with_progress
from compresskit.quant.scheme import Scheme
from compresskit.sparse.detect import detect

INTEGER_BITS = 8
TOO_FEW = "too few zeros to pay for saying where they are"


@dataclass(frozen=True, slots=True)
class Bitmask:
    """A bit for each weight and the kept ones; integers stay integers. What would not shrink stays dense."""

    least_bytes: ClassVar[int] = 0
    runtimes: ClassVar[tuple[str, ...]] = ("compresskit",)

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """A layer is quantised to what has no plain integer of 8 bits, with 0 for zero."""
        return layer_faults(model, where, self._judge)

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Pack it, tensor by tensor, and read it back; which layers stay dense is said."""
        layers, dense = _survey(model)
        copy_sidecars(model.directory, out)
        if not layers:
            write_shards(out, tensors_of(model, "writing"))
            set_quantization(out, None)
            return (f"Nothing is packed, and what was written is dense. {_dense(dense)}",)
        form, integers = Format(layers), _Integers(model)
        grids = {name: grid for name in layers if (grid := integers.grid(name)) is not None}
        write_shards(out, form.encode(tensors_of(model, "packing"), grids))
        ignored = [name for name in model.anatomy.linears if name not in layers]
        set_quantization(out, form.config(grids, ignored))
        read_back(integers, out)
        said = [_dense(dense)] if dense else []
        return (*said, *_roundings(model, layers))

    @staticmethod
    def _judge(scheme: Scheme, in_features: int) -> tuple[str, str] | None:
        if scheme.number == "int" and scheme.symmetric and scheme.weight_bits <= INTEGER_BITS:
            return None
        return "symmetric integers", "Quantise to w8a16, w8a8 or w4a16 instead, or export to another target."


def refusal(linear: Linear) -> str:
    """Why the weight of such a layer cannot be packed, whatever its zeros; empty where it can."""
    if linear.tied:
        return "shared with another module, which needs it dense"
    if not linear.is_plain and not linear.transposed:
        return "of a class that multiplies in a way of its own"
    return ""


def foresee(
    anatomy: Anatomy,
    forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    kept: Mapping[str, int],
    schemes: Mapping[str, Scheme],
) -> tuple[int, int, tuple[str, ...]]:
    """What the target will take, before there is a weight.

    Args:
        anatomy: of the model that will be written.
        forms: type and shape of every parameter that will be stored dense.
        kept: of each layer that has zeros, how many weights are not zero.
        schemes: of each quantised layer.

    Returns:
        Bytes of all tensors on disk, of the same dense, and the layers that will be packed.
    """
    dense = sum(dtype.itemsize * prod(shape) for dtype, shape in forms.values())
    total, packed = dense, []
    for name, linear in anatomy.linears.items():
        dtype, shape = forms.get(f"{name}.weight", (torch.float64, ()))
        short = str(dtype).removeprefix("torch.")
        if refusal(linear) or short not in TYPES:
            continue
        scheme = schemes.get(name)
        layer = PackedLayer(
            shape=(linear.out_features, linear.in_features),
            kept=kept.get(name, prod(shape)),
            dtype=short,
            bits=None if scheme is None else scheme.weight_bits,
            group_size=None if scheme is None else scheme.group_size,
        )
        if layer.bytes < layer.dense_bytes:
            total += layer.bytes - layer.dense_bytes
            packed.append(name)
    return total, dense, tuple(packed)


class _Integers:
    """A model whose quantised layers have their integers, and nothing that is done to their inputs."""

    def __init__(self, model: ModelSource) -> None:
        self._model = model
        self.directory: Path = model.directory
        self.anatomy: Any = model.anatomy

    def names(self) -> tuple[str, ...]:
        return self._model.names()

    def tensor(self, name: str) -> Tensor:
        return self._model.tensor(name)

    def place(self, name: str) -> Stored:
        return self._model.place(name)

    def grid(self, layer: str) -> Grid | None:
        grid = self._model.grid(layer)
        return grid and replace(grid, activation_bits=None, activation_scale=None)


def _survey(model: ModelSource) -> tuple[dict[str, PackedLayer], dict[str, str]]:
    """The layers to pack, and why the others that have zeros or integers are not, each read once."""
    layers, dense = {}, {}
    integers = _Integers(model)
    for name, layer, reason in _looked(model, integers):
        if layer is not None and layer.bytes < layer.dense_bytes:
            layers[name] = layer
        else:
            dense[name] = reason or TOO_FEW
    return layers, dense


def _looked(model: ModelSource, integers: _Integers) -> Iterator[tuple[str, PackedLayer | None, str]]:
    for name, linear in with_progress(list(model.anatomy.linears.items()), "counting zeros", unit="layers"):
        if reason := refusal(linear):
            yield name, None, reason
            continue
        weight_OI = model.weight_OI(name)
        short = str(weight_OI.dtype).removeprefix("torch.")
        if short not in TYPES:
            yield name, None, f"of {short}, which no layout holds"
            continue
        zeros = detect(weight_OI == 0)
        pattern = f"{zeros.group[0]}:{zeros.group[1]}" if zeros.group else ""
        grid = integers.grid(name)
        yield name, layer_of(weight_OI, grid, pattern=pattern, transposed=linear.transposed), ""
        del weight_OI


def _dense(layers: Mapping[str, str]) -> str:
    """Which layers stay dense, and why."""
    by: dict[str, list[str]] = {}
    for name, reason in layers.items():
        by.setdefault(reason, []).append(name)
    return " ".join(
        f"{len(names)} linear {'layers stay' if len(names) > 1 else 'layer stays'} dense, {reason}: "
        f"{listed(names)}."
        for reason, names in by.items()
    )


def _roundings(model: ModelSource, layers: Mapping[str, PackedLayer]) -> Iterator[str]:
    """What the target does not keep of quantised layers."""
    grids = [grid for name in layers if (grid := model.grid(name)) is not None]
    if rounded := sum(grid.activation_bits is not None for grid in grids):
        yield f"The inputs of {rounded} layers are rounded no more: SparseLinear takes them as they are."
    if short := sum(grid.bits < INTEGER_BITS for grid in grids):
        yield f"The integers of {short} layers, of fewer than 8 bits, take a byte each that is kept."
