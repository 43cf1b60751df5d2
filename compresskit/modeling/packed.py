"""A packed checkpoint read as the dense one it was made from, with its grids: one layer at a time.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import Fault, FormatError, ModelError
from compresskit.formats import FORMATS
from compresskit.formats.base import Decoded
from compresskit.formats.grid import Grid
from compresskit.modeling.checkpoint import Layout, find_tensors, listed
from compresskit.modeling.source import ModelSource

MANIFEST = "compresskit.json"


class UnpackedModel(ModelSource):
    """A checkpoint with packed weights, as if it were dense: same reads, plain parameter names, grids.

    A layer is decoded when one of its parameters is asked for, and forgotten when another layer's is; so
    :meth:`place` knows only what is stored plain. The source has made the checks that ``ModelSource`` makes.

    Args:
        source: a checkpoint whose ``is_compressed`` is true.

    Raises:
        FormatError: packed in a form that compresskit does not read.
        ModelError: parameters are missing.
    """

    def __init__(self, source: ModelSource) -> None:
        packing = _plain(source.config.quantization_config)
        method = str(packing.get("quant_method"))
        if method not in FORMATS:
            cure = f"Known: {', '.join(FORMATS)}. Start from the model before it was compressed."
            where = f"{source.directory / 'config.json'}: quantization_config"
            raise FormatError(Fault(where, "a packing that compresskit reads", method, cure))
        self.directory = source.directory
        self.trust_remote_code = source.trust_remote_code
        self.config = deepcopy(source.config)
        del self.config.quantization_config
        self.is_compressed = False
        self.anatomy = source.anatomy
        self._packing = packing
        self._format = FORMATS[method]()
        self._stored = find_tensors(source.directory)
        self._last: tuple[str, dict[str, Decoded]] = ("", {})
        self._aliases = {name: group[0] for group in self.anatomy.tied for name in group[1:]}
        self._layers = {self._layer_of(key) for key in self._stored} - {None}
        self._names = self._find_names()
        plain = {key: place for key, place in self._stored.items() if self._layer_of(key) is None}
        self._layout = Layout(plain, self._aliases, ())

    def __contains__(self, name: object) -> bool:
        return self._aliases.get(str(name), name) in self._names

    def names(self) -> tuple[str, ...]:
        """Names of all parameters, in the module's order; of tied parameters only the first."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """The parameter ``name``, dequantised, on the CPU.

        Raises:
            ModelError: no such parameter, or its file is damaged.
            FormatError: its packed parts do not fit together.
        """
        return self._decoded(name).tensor

    def grid(self, layer: str) -> Grid | None:
        """The grid that ``layer`` is packed on, if it is."""
        if layer not in self._layers or layer not in self.anatomy.linears:
            return None
        return self._decoded(f"{layer}.weight").grid

    def stored_bytes(self, layer: str) -> dict[str, int]:
        """Part -> its bytes on the disk, of a packed ``layer``; empty for one that is stored plain."""
        if layer not in self._layers:
            return {}
        start, bias = f"{layer}.", f"{layer}.bias"
        found = {key: place for key, place in self._stored.items() if key.startswith(start) and key != bias}
        return {key.removeprefix(start): place.num_bytes for key, place in found.items()}

    @property
    def is_quantised(self) -> bool:
        """Whether any layer's weights lie on a grid."""
        return bool(self._layers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The dense shape of ``name``."""
        return self.anatomy.parameter_shapes.get(name) or tuple(self.tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dense dtype of ``name``."""
        return self.tensor(name).dtype

    def _decoded(self, name: str) -> Decoded:
        name = self._aliases.get(name, name)
        layer = name.rpartition(".")[0]
        if layer not in self._layers:
            if name not in self._stored:
                raise ModelError(Fault(str(self.directory), "a parameter's name", repr(name), "Check it."))
            return Decoded(name, self._stored[name].read(), None)
        if self._last[0] != layer:
            parts = ((k, p.read()) for k, p in self._stored.items() if k.startswith(f"{layer}."))
            self._last = (layer, {d.name: d for d in self._format.decode(parts, self._packing)})
        return self._last[1][name]

    def _layer_of(self, key: str) -> str | None:
        """The packed layer that ``key`` is a part of; None for what is stored plain."""
        for layer in (key.rpartition(".")[0], key.partition(".weight.")[0]):
            if layer in self.anatomy.linears and key != f"{layer}.weight" and key != f"{layer}.bias":
                return layer
        return None

    def _find_names(self) -> tuple[str, ...]:
        shapes = self.anatomy.parameter_shapes
        plain = {key for key in self._stored if self._layer_of(key) is None}
        packed = {f"{layer}.weight" for layer in self._layers}
        known = [name for name in shapes if name in plain | packed and name not in self._aliases]
        if lost := [name for name in shapes if name not in known and name not in self._aliases]:
            cure = (
                "Fetch the checkpoint again; it is incomplete, or packed by other means than compresskit's."
            )
            got = f"none for {listed(lost)}"
            raise ModelError(Fault(str(self.directory), "every weight of the model", got, cure))
        return (*known, *sorted(plain - set(shapes)))


def unpacked(source: ModelSource) -> ModelSource:
    """``source`` itself where its weights are plain, else a reader that unpacks them."""
    return UnpackedModel(source) if source.is_compressed else source


def packed_fault(source: ModelSource, where: str) -> Fault:
    """What to say where plain weights are needed and ``source`` has packed ones.

    Args:
        source: a checkpoint whose ``is_compressed`` is true.
        where: the place that names it, e.g. ``model``.

    Returns:
        A fault that names the stage which packed it, if compresskit did, and the way back.
    """
    directory = source.directory
    stage = _quantising_stage(directory)
    start = "the checkpoint before its quantisation"
    if stage is not None and Path(stage[1]).exists():
        start = stage[1]
    by = (
        f" by stage {stage[0]}"
        if stage
        else f" ({_plain(source.config.quantization_config).get('quant_method')})"
    )
    cure = f"Start from {start}, or write it dense with `compresskit export {directory} --to dense -o DENSE`."
    return Fault(where, "dense weights", f"{directory}, already quantised{by}", cure)


def _quantising_stage(directory: Path) -> tuple[str, str] | None:
    """``2-quantize (w8a8)`` and the model that its run began with, from the manifest if there is one."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        for stage in reversed(manifest["stages"]):
            schemes = {p["scheme"] for p in stage["result"]["promises"] if p["kind"] == "grid"}
            if schemes:
                return f"{stage['name']} ({', '.join(sorted(schemes))})", str(manifest["recipe"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no manifest, or none of ours: the fault is told without a stage
    return None


def _plain(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return found
