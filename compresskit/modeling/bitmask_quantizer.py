"""What is done to a model while transformers loads a bitmask checkpoint, and before it saves one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.errors import Fault, FormatError
from compresskit.formats.bitmask import (
    AGAIN,
    MAX_NAMED,
    SHAPE,
    PackedLayer,
    form_faults,
    layers_of,
    missing_fault,
)
from compresskit.formats.shards import Stored, read_header
from compresskit.kernels.choice import kind_of, wish_here
from compresskit.modeling.sparse_linear import SparseLinear, sparse_layers
from compresskit.progress import with_progress

LOADED = "_is_hf_initialized"
"""What transformers sets on a tensor that it has read."""


def prepare(model: Any, config: Mapping[str, Any], files: Iterable[str] | None) -> None:
    """Put a SparseLinear, on the meta device, where each packed layer is.

    Args:
        model: a skeleton; changed.
        config: the ``quantization_config``.
        files: of the checkpoint, whose headers are compared with it; None where there are none.

    Raises:
        FormatError: everything in which configuration, files and model contradict each other.
        ModelError: a file is cut short or has no header.
    """
    layers = layers_of(config)
    stored = {key: place for file in files or () for key, place in read_header(Path(file)).items()}
    names = {name: _name_in(model, name) for name in layers}
    faults = [
        Fault(name, f"a linear layer of {type(model).__name__}", "none", AGAIN)
        for name, found in names.items()
        if found is None
    ]
    for name, layer in layers.items():
        if (found := names[name]) is not None:
            faults += _misfits(name, layer, model.get_submodule(found))
        if stored:
            faults += _file_faults(name, layer, stored)
    if faults:
        raise FormatError(*faults[:MAX_NAMED])
    for name, layer in layers.items():
        place = str(names[name])
        old = model.get_submodule(place)
        made = SparseLinear(layer, dtype=old.weight.dtype, bias=old.bias is not None)
        made.train(old.training)
        model.set_submodule(place, made)
    shapes = {rf"(^|\.){name.replace('.', chr(92) + '.')}\.{SHAPE}$" for name in layers}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, *shapes}


def finish(model: Any, *, layout: str = "", resident: str = "", device: str = "") -> None:
    """Check what was read into each SparseLinear, and have it choose how to multiply.

    Args:
        model: its weights are read; changed.
        layout: see ``compresskit.kernels.choice.Wish``; empty is as the environment says.
        resident: the same.
        device: to compute on; empty is where the weights are.

    Raises:
        FormatError: every layer that was not read, or whose parts contradict each other.
        EngineError: the layout asked for cannot multiply a layer.
    """
    layers = sparse_layers(model)
    faults = []
    for name, layer in layers.items():
        faults += _reading_faults(name, layer)
        if len(faults) >= MAX_NAMED:
            break
    if faults:
        raise FormatError(*faults[:MAX_NAMED])
    place = torch.device(device) if device else None
    kinds = {
        kind_of(layer.bitmap(), layer.dtype, layer.layer.group, place or layer.device)
        for layer in layers.values()
    }
    wish = wish_here(
        layout=layout,
        resident=resident,
        kinds=len(kinds),
        model_bytes=sum(layer.layer.dense_bytes for layer in layers.values()),
    )
    for layer in with_progress(list(layers.values()), "packing weights", unit="layers"):
        layer.settle(wish, place)


def config_now(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` that goes with the layers of ``model`` as they are now."""
    from compresskit.formats.bitmask import Bitmask

    layers = {name: layer.layer for name, layer in sparse_layers(model).items()}
    return Bitmask(layers).config({}, list(config.get("ignore", ())))


def _name_in(model: Any, name: str) -> str | None:
    """The name of a layer in ``model``, which may be with or without its head."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _misfits(name: str, layer: PackedLayer, module: nn.Module) -> list[Fault]:
    """What keeps a SparseLinear from standing in the place of ``module``."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return [Fault(name, "a linear layer", type(module).__name__, AGAIN)]
    turned = isinstance(module, Conv1D)
    shape = tuple(module.weight.shape)[::-1] if turned else tuple(module.weight.shape)
    if turned == layer.transposed and shape == layer.shape:
        return []
    return [Fault(name, f"the model's shape {shape}", f"{layer.shape} in config.json", AGAIN)]


def _file_faults(name: str, layer: PackedLayer, stored: Mapping[str, Stored]) -> list[Fault]:
    found = {part: stored[key] for part in layer.parts if (key := f"{name}.{part}") in stored}
    return form_faults(name, layer, {part: (place.dtype, place.shape) for part, place in found.items()})


def _reading_faults(name: str, layer: SparseLinear) -> list[Fault]:
    parts = {part: layer.get_buffer(part) for part in layer.layer.parts if part != SHAPE}
    read = [part for part, tensor in parts.items() if getattr(tensor, LOADED, False)]
    if len(read) < len(parts):
        return [missing_fault(name, layer.layer, [SHAPE, *read])]
    if layer.device.type == "meta":
        cure = "Load the model onto one device, or export it to dense (`compresskit export --to dense`)."
        return [Fault(name, "a packed weight in memory", "one offloaded to the disk", cure)]
    values = parts["values"]
    if values.is_floating_point() and values.dtype != layer.dtype:  # some models keep layers in float32
        layer.retype(values.dtype)
    return layer.layer.faults(layer.bitmap(), name)
