"""What is done to a model while transformers loads a bitmask checkpoint, and before it saves one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.errors import Fault, FormatError
from compresskit.formats.bitmask import (
    AGAIN,
    MAX_NAMED,
    PARTS,
    SHAPE,
    PackedLayer,
    form_faults,
    layers_of,
    missing_fault,
)
from compresskit.formats.shards import Stored, read_header
from compresskit.kernels.choice import kind_of, wish_here
from compresskit.kernels.memory import Demand, free_bytes, give_back, shortage
from compresskit.modeling.sparse_linear import SparseLinear, sparse_layers
from compresskit.progress import with_progress

LOADED = "_is_hf_initialized"
"""What transformers sets on a tensor that it has read."""


Places = Mapping[str, Stored]
"""Part of a packed layer -> where it is stored."""


def prepare(model: Any, config: Mapping[str, Any], files: Iterable[str] | None) -> dict[str, Places]:
    """Put a SparseLinear, on the meta device, where each packed layer is.

    Args:
        model: a skeleton; changed.
        config: the ``quantization_config``.
        files: of the checkpoint, whose headers are compared with it; None where there are none.

    Returns:
        Where the tensors of each SparseLinear are stored, by its name in ``model``; none without files.

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
            faults += _tied_faults(name, f"{found}.weight", model)
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
    return {
        str(names[name]): {part: stored[f"{name}.{part}"] for part in layer.parts if part != SHAPE}
        for name, layer in layers.items()
        if stored
    }


def finish(
    model: Any,
    places: Mapping[str, Places] | None = None,
    *,
    layout: str = "",
    resident: str = "",
    device: str = "",
) -> None:
    """Check what was read into each SparseLinear, and have it choose how to multiply.

    One layer after another is packed and its checkpoint's form forgotten, the first of each kind before all
    others: so no more is ever in memory than stays there, and one layer, or the copies of one that is timed.

    Args:
        model: its weights are read; changed.
        places: what :func:`prepare` gave.
        layout: see ``compresskit.kernels.choice.Wish``; empty is as the environment says.
        resident: the same; where nobody says it, ``packed`` if there is no room for more.
        device: to compute on; empty is where the weights are.

    Raises:
        FormatError: every layer that was not read, or whose parts contradict each other.
        EngineError: the layout asked for cannot multiply a layer.
    """
    layers = sparse_layers(model)
    target = torch.device(device) if device else None
    lost = {name: found for name, layer in layers.items() if (found := _reading_faults(name, layer))}
    if lost:
        told = [f for name, layer in layers.items() for f in lost.get(name) or _content_faults(name, layer)]
        raise FormatError(*told[:MAX_NAMED])
    first = {
        kind_of(layer.bitmap(), layer.dtype, layer.layer.group, target or layer.device): name
        for name, layer in reversed(layers.items())
    }
    wish = wish_here(
        shortage=shortage(_demands(model, layers, target)),
        layout=layout,
        resident=resident,
        kinds=len(first),
        model_bytes=sum(layer.layer.dense_bytes for layer in layers.values()),
    )
    faults: list[Fault | str] = []
    order = [*first.values(), *(name for name in layers if name not in first.values())]
    for name in with_progress(order, "packing weights", unit="layers"):
        if faults:  # which there are to tell; nothing more is packed
            faults += _content_faults(name, layers[name])
            continue
        _read_anew(layers[name], (places or {}).get(name, {}))
        try:
            layers[name].settle(wish, target, name)
        except FormatError as error:
            faults += error.faults
        give_back()
    if faults:
        raise FormatError(*faults[:MAX_NAMED])


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
    if shape == layer.shape:
        got = f"transposed: {layer.transposed} in config.json"
        return [Fault(name, f"transposed: {turned}, as {type(module).__name__} stores it", got, AGAIN)]
    return [Fault(name, f"the model's shape {shape}", f"{layer.shape} in config.json", AGAIN)]


def _tied_faults(name: str, weight: str, model: Any) -> list[Fault]:
    """The dense weight of a packed layer is no tensor that another module could share."""
    tied = model.all_tied_weights_keys
    if weight not in {*tied, *tied.values()}:
        return []
    cure = "Export the model again, which leaves such layers dense, or set tie_word_embeddings to false."
    return [Fault(name, "a weight of its own", "one that config.json ties to another module's", cure)]


def _file_faults(name: str, layer: PackedLayer, stored: Mapping[str, Stored]) -> list[Fault]:
    found = {part: stored[key] for part in PARTS if (key := f"{name}.{part}") in stored}
    return form_faults(name, layer, {part: (place.dtype, place.shape) for part, place in found.items()})


def _reading_faults(name: str, layer: SparseLinear) -> list[Fault]:
    parts = {part: layer.get_buffer(part) for part in layer.layer.parts if part != SHAPE}
    read = [part for part, tensor in parts.items() if getattr(tensor, LOADED, False)]
    if len(read) < len(parts):
        return [missing_fault(name, layer.layer, [SHAPE, *read])]
    if any(tensor.device.type == "meta" for tensor in (*layer.parameters(), *layer.buffers())):
        cure = "Load the model onto one device, or export it to dense (`compresskit export --to dense`)."
        return [Fault(name, "a packed weight in memory", "one offloaded to the disk", cure)]
    if layer.bias is not None and not getattr(layer.bias, LOADED, False):
        return [Fault(name, "the bias that the model has", "none", AGAIN)]
    values = parts["values"]
    if values.is_floating_point() and values.dtype != layer.dtype:  # some models keep layers in float32
        layer.retype(values.dtype)
    return []


def _content_faults(name: str, layer: SparseLinear) -> list[Fault]:
    return layer.layer.faults(layer.bitmap(), name)


def _read_anew(layer: SparseLinear, places: Places) -> None:
    """Take from the file what lies in a map of it: pages of a map stay in memory as long as the model does.

    What was changed on the way, to another type or device, is no part of a map.
    """
    for part, place in places.items():
        tensor = layer.get_buffer(part)
        if tensor.device.type == "cpu" and tensor.dtype == place.dtype:
            setattr(layer, part, place.read())


def _demands(
    model: nn.Module, layers: Mapping[str, SparseLinear], target: torch.device | None
) -> Iterator[Demand]:
    """What each device that computes is asked to hold."""
    packed = {id(tensor) for layer in layers.values() for tensor in layer.buffers()}
    for device in {target or layer.device for layer in layers.values()}:
        here = [layer for layer in layers.values() if (target or layer.device) == device]
        held = sum(t.nbytes for layer in here for t in layer.buffers() if t.device == device)
        on_gpu = device.type == "cuda"
        others = (t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed)
        free = free_bytes(device)
        yield Demand(
            device=str(device),
            # On the CPU it lies in a map of the file, whose pages count as free.
            free_bytes=free + held if free is not None and on_gpu else free,
            packed_bytes=sum(layer.layer.bytes for layer in here),
            dense_bytes=sum(layer.layer.dense_bytes for layer in here),
            other_bytes=sum(t.nbytes for t in others if not (on_gpu and t.device == device)),
        )
