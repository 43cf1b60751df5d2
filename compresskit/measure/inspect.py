"""What each linear layer of a checkpoint is, read from its weights, and what its zeros are worth here.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.formats.bitmask import MASK, SCALES, VALUES
from compresskit.kernels.limits import (
    DENSE,
    PACKED_BY,
    Packing,
    Values,
    ZeroLayout,
    gain_on,
    packings,
    values_of,
)
from compresskit.measure.matvec import Timing, time_layer
from compresskit.measure.suite import device_name
from compresskit.modeling import ModelSource, open_model, resolve_device
from compresskit.modeling.packed import UnpackedModel, unpacked
from compresskit.progress import with_progress
from compresskit.sparse.detect import detect
from compresskit.timing import is_crowded, load_average, processor

Json = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWorth:
    """One linear layer.

    Attributes:
        name: qualified module name.
        out_features: O.
        in_features: I.
        zeros: how its zeros lie.
        values: of one stored weight.
        stored_bytes: of ``mask``, ``values`` and ``scales``, where a file leaves zeros out; else empty.
        timing: at batch 1; None where it was not asked for, or nothing could be gained.
        timed_as: the layer that was timed for it, of the same shape and pattern.
    """

    name: str
    out_features: int
    in_features: int
    zeros: ZeroLayout
    values: Values
    stored_bytes: Mapping[str, int] = field(default_factory=dict)
    timing: Timing | None = None
    timed_as: str = ""

    @property
    def packing(self) -> Packing:
        """Of the fewest bytes."""
        return packings(self.values, self.zeros)[0]

    @property
    def bytes_per_weight(self) -> float:
        """As it is stored, zeros counted."""
        if not self.stored_bytes:
            return self.values.bytes_per_weight
        return sum(self.stored_bytes.values()) / (self.out_features * self.in_features)

    @property
    def limit(self) -> float:
        """What it gains at batch 1 over the layer as it is stored, at most."""
        return self.bytes_per_weight / self.packing.bytes_per_weight

    def to_json(self) -> dict[str, Json]:
        """Plain data; times are medians in milliseconds, with their quartiles."""
        plain: dict[str, Json] = {
            "name": self.name,
            "shape": [self.out_features, self.in_features],
            "zero_fraction": self.zeros.zero_fraction,
            "pattern": str(self.zeros),
            "bits": 8 * self.values.bytes_per_weight,
            "bytes_per_weight": self.bytes_per_weight,
            "stored_bytes": dict(self.stored_bytes) or None,
            "packed": {"storage": self.packing.storage, "bytes_per_weight": self.packing.bytes_per_weight},
            "limit": self.limit,
            "gain_on": {name: gain_on(name, self.values, self.zeros) for name in PACKED_BY},
        }
        if self.timing is not None:
            sparse = self.timing.sparse_ms
            plain["timing"] = {
                "kernel": self.timing.kernel or None,
                "dense_ms": self.timing.dense_ms[1],
                "sparse_ms": sparse[1] if sparse else None,
                "quartiles": {"dense_ms": self.timing.dense_ms, **({"sparse_ms": sparse} if sparse else {})},
                "ratio": self.timing.ratio,
                "timed_as": self.timed_as,
                "notes": list(self.timing.notes),
            }
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All linear layers of a checkpoint, in the model's order.

    Attributes:
        layers: of the model, head and all.
        dtype: that it is computed in.
        device: that was timed: ``cpu`` or the accelerator's name; empty if nothing was.
        processor: name of the CPU and its cores.
        threads: of one operation on the CPU.
        notes: sentences that a reader of the times has to know.
    """

    layers: tuple[LayerWorth, ...]
    dtype: str
    device: str
    processor: str
    threads: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        """Plain data."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "dtype": self.dtype,
            "device": self.device or None,
            "processor": self.processor,
            "threads": self.threads,
            "notes": list(self.notes),
        }


def inspect_layers(
    directory: str | Path, *, timed: bool = False, device: str = "auto", trust_remote_code: bool = False
) -> Inspection:
    """Look at every linear layer of the model in ``directory``, one in memory at a time.

    Args:
        directory: any Hugging Face checkpoint, packed or not, or a hub id.
        timed: whether to measure, at batch 1, what leaving zeros out gains on ``device``; of layers of one
            shape and pattern the first is.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        trust_remote_code: whether code in the directory may run.

    Returns:
        The layers and what was measured of them.

    Raises:
        InputError: no such device.
        ModelError: no model, or weights that cannot be read.
        FormatError: packed in a form that compresskit does not read.
    """
    place, load = resolve_device(device), load_average()
    # Of a config.json open_model would build a model, and its random weights are nobody's to inspect.
    here = Path(directory).exists()
    opened = ModelSource(directory, trust_remote_code=trust_remote_code) if here else open_model(directory)
    source = unpacked(opened)
    linears = source.anatomy.linears
    weights = sum(linear.out_features * linear.in_features for linear in linears.values())
    model_bytes = weights * source.compute_dtype.itemsize
    known: dict[tuple[Any, ...], tuple[Timing, str]] = {}
    found = []
    for name in with_progress(list(linears), "inspecting", unit="layers"):
        weight_OI = source.weight_OI(name)
        layer = _look(name, weight_OI, source)
        if timed and layer.packing.storage != DENSE:
            key = (weight_OI.shape, str(layer.zeros), round(layer.zeros.zero_fraction, 2))
            if key not in known:
                there = weight_OI.to(place, source.compute_dtype)
                known[key] = time_layer(there, layer.zeros, model_bytes=model_bytes), name
            timing, first = known[key]
            layer = replace(layer, timing=timing, timed_as=first)
        found.append(layer)
        del weight_OI
    return Inspection(
        layers=tuple(found),
        dtype=str(source.compute_dtype).removeprefix("torch."),
        device=device_name(str(place)) if known else "",
        processor=processor(),
        threads=torch.get_num_threads(),
        notes=_notes([t for t, _ in known.values()], timed, place, max(load, load_average())),
    )


def _look(name: str, weight_OI: Tensor, source: ModelSource) -> LayerWorth:
    """One layer, without its times."""
    grid = source.grid(name)
    bits = 8.0 * weight_OI.itemsize if grid is None else grid.bits_per_weight(weight_OI.shape[1])
    parts = source.stored_bytes(name) if isinstance(source, UnpackedModel) else {}
    known = (part for part in (MASK, VALUES, SCALES) if part in parts)
    return LayerWorth(
        name=name,
        out_features=weight_OI.shape[0],
        in_features=weight_OI.shape[1],
        zeros=detect(weight_OI == 0),
        values=values_of(bits),
        stored_bytes={part: parts[part] for part in known} if MASK in parts else {},
    )


def _notes(timings: Sequence[Timing], timed: bool, place: torch.device, load: float) -> tuple[str, ...]:
    """What kernels refused, each once, whether the machine was busy, or that there was nothing to time."""
    if timed and not timings:
        return ("Nothing was timed: in no layer are there zeros enough to pay for saying where they are.",)
    notes = list(dict.fromkeys(note for timing in timings for note in timing.notes))
    if timings and place.type == "cpu" and is_crowded(load):
        notes.append(f"The machine had more work than its {os.cpu_count()} cores: ratios may be chance.")
    return tuple(notes)
