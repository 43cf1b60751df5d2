"""Which tensor of which file is which parameter of the module.

A checkpoint may lack the base model's prefix (GPT-2's hub files) or carry one too many, use names that
transformers has since changed, and store one of a group of tied parameters under any of its names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from compresskit.errors import Fault, ModelError
from compresskit.formats.shards import Stored, read_header
from compresskit.modeling.anatomy import anatomy_of, tied_groups

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHERS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx")
MAX_NAMES = 10


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every parameter is.

    Attributes:
        places: parameter and buffer names of the module, in its order, to their place; of a tied group only
            the first name.
        aliases: the other names of tied groups to the first.
        unused: keys of the checkpoint that the module has no place for.
    """

    places: Mapping[str, Stored]
    aliases: Mapping[str, str]
    unused: tuple[str, ...]


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in ``directory`` by its key; reads headers only.

    Args:
        directory: holds ``model.safetensors``, or an index and its shards.

    Returns:
        Key -> place.

    Raises:
        ModelError: no safetensors weights, a shard is missing or damaged, or lacks a tensor of the index.
    """
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise ModelError(_no_weights(directory))
    try:
        files = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            Fault(
                str(directory / INDEX),
                'a JSON object with "weight_map"',
                f"{type(error).__name__}: {error}",
                "Fetch the index again.",
            )
        ) from error
    absent = [name for name in shards if not (directory / name).is_file()]
    if absent:
        got = f"no {', '.join(absent)}"
        raise ModelError(Fault(str(directory), "every shard of the index", got, "Fetch the missing shards."))
    headers = {name: read_header(directory / name) for name in shards}
    lost = [f"{key} in {name}" for key, name in files.items() if key not in headers[name]]
    if lost:
        got = f"none for {listed(lost)}"
        raise ModelError(
            Fault(
                str(directory / INDEX),
                "every tensor of the index in its shard",
                got,
                "Fetch the shards again.",
            )
        )
    return {key: headers[name][key] for key, name in files.items()}


def lay_out(stored: Mapping[str, Stored], model: PreTrainedModel, directory: Path) -> Layout:
    """Match the tensors of a checkpoint with the parameters of ``model``.

    Args:
        stored: key -> place.
        model: a skeleton.
        directory: to name in errors.

    Returns:
        The layout; every parameter of ``model`` has its place.

    Raises:
        ModelError: all parameters that are missing, have another shape, or are tied but stored twice with
            different values.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rename = _Renamer(model)
    places: dict[str, Stored] = {}
    unused = []
    for key, place in stored.items():
        name = rename(key, wanted)
        if name is None:
            unused.append(key)
        elif name not in places or key == name:
            places[name] = place
    groups = tied_groups(model)
    aliases = {name: group[0] for group in groups for name in group[1:]}
    faults = [fault for group in groups if (fault := _settle(group, places, directory))]
    missing = [name for name in wanted if name not in aliases and name not in places]
    if missing:
        faults.append(_missing(missing, unused, rename.converted, model, directory))
    for name, place in places.items():
        if place.shape != wanted[name]:
            cure = "Correct config.json, or fetch the checkpoint that belongs to it."
            where = f"{place.path}: {place.key}"
            faults.append(Fault(where, f"shape {wanted[name]} as config.json says", f"{place.shape}", cure))
    if faults:
        raise ModelError(*faults)
    known = _ignored(unused, model)
    return Layout(
        places={name: places[name] for name in wanted if name in places and name not in aliases},
        aliases=aliases,
        unused=tuple(key for key in unused if key not in known),
    )


def listed(names: Iterable[str]) -> str:
    """At most ten names as text, the rest counted."""
    names = list(names)
    text = ", ".join(names[:MAX_NAMES])
    return text + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def is_stored_otherwise(model: PreTrainedModel) -> bool:
    """Whether ``save_pretrained`` writes it under other names, or in other shapes, than it has as it runs."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


class _Renamer:
    """Maps a checkpoint's keys to a module's names the way ``from_pretrained`` does."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = model.base_model_prefix + "."
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.converted: list[str] = []

    def __call__(self, key: str, wanted: Mapping[str, object]) -> str | None:
        """The name of ``key`` in ``wanted``; None if there is none. Keys that need arithmetic are noted."""
        for name in (key, self._renamed(key)):
            for candidate in (name, name.removeprefix(self._prefix), self._prefix + name):
                if candidate in wanted:
                    return candidate
        if any(converter.rename_source_key(key)[1] is not None for converter in self._converters):
            self.converted.append(key)
        return None

    def _renamed(self, key: str) -> str:
        for renaming in self._renamings:
            key = renaming.rename_source_key(key)[0]
        return key


def _settle(group: tuple[str, ...], places: dict[str, Stored], directory: Path) -> Fault | None:
    """Give the first name of a tied group the place of whichever is stored; a Fault if they differ."""
    held = [name for name in group if name in places]
    if not held:
        return None
    first = places[held[0]]
    for name in held[1:]:
        other = places[name]
        if other.shape == first.shape and not torch.equal(first.read(), other.read()):
            return Fault(
                str(directory / "config.json"),
                f"{first.key} and {other.key} equal, as they are tied",
                "different tensors",
                'Set "tie_word_embeddings" to false there, or fetch the checkpoint again.',
            )
    places[group[0]] = first
    for name in group[1:]:
        places.pop(name, None)
    return None


def _missing(
    missing: list[str], unused: list[str], converted: list[str], model: PreTrainedModel, directory: Path
) -> Fault:
    got = f"none for {listed(missing)}"
    cure = "Fetch the checkpoint again, or correct config.json."
    if converted:
        got += f"; {listed(converted)} would have to be merged or split first"
        cure = (
            f"{type(model).__name__} stores its weights in another form than it computes with: not supported."
        )
    elif unused:
        got += f"; no place for {listed(unused)}"
        cure = "Correct config.json: its architecture is not the one these weights belong to."
    if missing == [f"{anatomy_of(model).head}.weight"]:
        cure = 'Set "tie_word_embeddings" to true in config.json if the model shares it, or fetch it again.'
    return Fault(str(directory), f"every weight of {type(model).__name__}", got, cure)


def _ignored(keys: list[str], model: PreTrainedModel) -> set[str]:
    """Of ``keys``, those that models once stored and now compute; transformers passes over them too."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$"]
    return {key for key in keys if any(re.search(pattern, key) for pattern in patterns)}


def _no_weights(directory: Path) -> Fault:
    """Say what was found where safetensors weights should be, and how to get them."""
    expected = f"{SINGLE} or {INDEX}"
    if (directory / "adapter_config.json").is_file():
        cure = "Merge the adapter into its base model (peft: merge_and_unload) and save that."
        return Fault(str(directory), expected, "a PEFT adapter", cure)
    for patterns, kind in ((PICKLES, "pickled weights"), (OTHERS, "weights in another format")):
        found = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
        if found:
            cure = (
                f"Load and save it once: AutoModel.from_pretrained({str(directory)!r}).save_pretrained(new)."
            )
            if kind == "pickled weights":
                cure += " Reading a pickle can run code: do so only if you trust its author."
            return Fault(str(directory), expected, f"only {kind}: {listed(found)}", cure)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        return Fault(
            str(directory), expected, f"{listed(shards)} without an index", f"Fetch {INDEX} as well."
        )
    cure = "Fetch the weights; to build the model anew instead, give the path of its config.json."
    return Fault(str(directory), expected, "no weights", cure)
