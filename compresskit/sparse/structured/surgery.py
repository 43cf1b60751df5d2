"""What a cut takes out of one model: found without weights, then done one tensor at a time.

Shapes: L = blocks, U = units of a width, O = out_features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.progress import Progress
from compresskit.sparse.pattern import smallest
from compresskit.sparse.structured.base import Scores
from compresskit.sparse.structured.dimensions import HIDDEN, UNITS, Dimensions
from compresskit.sparse.structured.resize import Changes, resized, with_blocks
from compresskit.stage import LayerRecord

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.structured.latency import Latency

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, eq=False)
class Patient:
    """The model that is cut, as far as it is known without weights.

    Attributes:
        config: its configuration; not changed.
        anatomy: its parts.
        directory: where code of its own would lie.
        trust_remote_code: whether that code may run.
    """

    config: Any
    anatomy: Anatomy
    directory: Path
    trust_remote_code: bool = False

    def with_blocks(self, keep: Sequence[int]) -> Changes:
        """What to change in the configuration so that only the blocks ``keep`` are left."""
        if len(keep) == len(self.anatomy.blocks):
            return {}
        trust = self.trust_remote_code
        return with_blocks(self.config, self.anatomy, self.directory, keep, trust_remote_code=trust)

    def after(self, changes: Changes) -> tuple[Any, Anatomy]:
        """The configuration with ``changes``, and the parts of its model."""
        config = resized(self.config, changes)
        skeleton = skeleton_of(config, self.directory, trust_remote_code=self.trust_remote_code)
        return config, anatomy_of(skeleton)


@dataclass(frozen=True, slots=True, eq=False)
class Surgery:
    """What a cut leaves of a model.

    Attributes:
        patient: the model that is cut, with every bias that it gets.
        blocks: how many; all of them where none goes.
        units: of each width that is cut, how many.
        dimensions: all widths that are known; None where none is cut.
        config: of the smaller model, its blocks evenly spaced ones.
        anatomy: of the smaller model.
        notes: sentences for the user.
        switched: what else was changed in the configuration.
        added: biases of the whole model that its checkpoint does not have; they are zero.
        latency: of a request to the smaller model, where the cut asks for it.
        latency_before: of one to the model that is cut, likewise.
    """

    patient: Patient
    blocks: int
    units: Mapping[str, int]
    dimensions: Dimensions | None
    config: Any
    anatomy: Anatomy
    notes: tuple[str, ...] = ()
    switched: Changes = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    latency: Latency | None = None
    latency_before: Latency | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Which parts of the model stay.

    Attributes:
        blocks: indices, ascending.
        units: by kind, True for those that stay: (L, U) for units of each block, (U,) for hidden channels.
        shifts: what to add to a bias of the whole model, (O,), by its name.
    """

    blocks: tuple[int, ...]
    units: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)


def spaced(count: int, keep: int) -> tuple[int, ...]:
    """``keep`` of ``count`` indices, evenly spaced, the first and (from two on) the last among them."""
    if keep == 1:
        return (0,)
    return tuple((2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep))


def operate(
    patient: Patient,
    dimensions: Dimensions | None,
    blocks: int,
    units: Mapping[str, int],
    notes: Sequence[str],
) -> Surgery:
    """What is left of ``patient`` after a cut to ``blocks`` and ``units``.

    Raises:
        ModelError: a model of the changed configuration has other parameters than the cut leaves.
    """
    keep = spaced(len(patient.anatomy.blocks), blocks)
    config, anatomy = require_fit(patient, dimensions, keep, units)
    return Surgery(patient, blocks, units, dimensions, config, anatomy, tuple(notes))


def require_fit(
    patient: Patient, dimensions: Dimensions | None, keep: Sequence[int], units: Mapping[str, int]
) -> tuple[Any, Anatomy]:
    """The configuration and the parts of what is left: what it names is what the cut leaves, shape by shape.

    Blocks may differ by their position, or by a list of the configuration that names some of them.

    Raises:
        ModelError: a model of the changed configuration has other parameters than the cut leaves.
    """
    changes = {**patient.with_blocks(keep), **(dimensions.changes(units) if dimensions else {})}
    where, cure = f"{patient.directory}: config.json", "Cut layers only, or another model."
    if not units:
        cure = "Keep other blocks: another number of layers, importance: magnitude, or cut another model."
    try:
        config, anatomy = patient.after(changes)
    except Exception as error:  # whatever a model's constructor raises over a wrong value
        got = f"{type(error).__name__}: {error}"
        raise ModelError(Fault(where, "keys that make a model of what stays", got, cure)) from error
    wanted, found = _shapes(patient.anatomy, dimensions, keep, units), anatomy.parameter_shapes
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong:
        expected = "keys that set the widths alone" if units else "blocks that are the same in another place"
        got = f"other parameters for blocks {', '.join(map(str, keep))}" if not units else "another shape"
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        fault = Fault(where, expected, f"{got}: {', '.join(wrong[:10])}{more}", cure)
        raise ModelError(fault)
    return config, anatomy


def choose(surgery: Surgery, scores: Scores, blocks: int) -> Kept:
    """The ``surgery.blocks`` of ``blocks`` blocks and the units of each that are worth most."""
    keep = tuple(range(blocks))
    if surgery.blocks < blocks:
        keep = spaced(blocks, surgery.blocks)
        if scores.blocks_L is not None:
            keep = tuple((~smallest(scores.blocks_L, blocks - surgery.blocks)).nonzero().flatten().tolist())
    units = {}
    for kind, count in surgery.units.items():
        score = scores.units[kind]
        units[kind] = ~smallest(score, score.shape[-1] - count)
    return Kept(keep, units)


def cut_tensor(model: ModelSource, surgery: Surgery, kept: Kept, name: str) -> Tensor:
    """Parameter ``name`` of a block that stays, or outside the blocks, without the units that go."""
    anatomy = model.anatomy
    if name in surgery.added:
        layer = name.removesuffix(".bias")
        tensor = torch.zeros(anatomy.linears[layer].out_features, dtype=model.dtype(f"{layer}.weight"))
    else:
        tensor = model.tensor(name)
    if name in kept.shifts:
        tensor = (tensor.double() + kept.shifts[name]).to(tensor.dtype)
    block = anatomy.block_of(name)
    for axis in surgery.dimensions.axes_of(name, anatomy) if surgery.dimensions else ():
        if axis.kind not in kept.units:
            continue
        keep_U = kept.units[axis.kind]
        if axis.kind != HIDDEN:
            keep_U = keep_U[anatomy.blocks.index(block or "")]
        tensor = tensor.index_select(axis.axis, keep_U[axis.owner_N].nonzero().flatten())
    return tensor


def smaller_tensors(
    model: ModelSource, surgery: Surgery, kept: Kept, records: list[LayerRecord]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the smaller model, read one at a time; fills ``records`` as it goes."""
    anatomy, entered = model.anatomy, None
    renamed = _renamed(anatomy, kept.blocks)
    with Progress("cutting", len(kept.blocks), unit="blocks") as progress:
        for name in _names(model, surgery):
            block = anatomy.block_of(name)
            if block is not None and block not in renamed:
                continue
            if block is not None and block != entered:
                entered = block
                progress.advance(note=block)
            tensor = cut_tensor(model, surgery, kept, name)
            target = name if block is None else renamed[block] + name.removeprefix(block)
            layer = name.removesuffix(".weight")
            if layer in anatomy.linears and name != layer and tensor.shape != model.shape(name):
                records.append(_record(target, tensor, _note(surgery, name, anatomy)))
            yield target, tensor


def _names(model: ModelSource, surgery: Surgery) -> Iterator[str]:
    """Every tensor of the checkpoint, and each bias it gets behind its weight."""
    for name in model.names():
        yield name
        bias = f"{name.removesuffix('weight')}bias"
        if bias in surgery.added and name.endswith(".weight"):
            yield bias


def write_config(model: ModelSource, changes: Changes, out: Path) -> None:
    """Copy config.json with ``changes``, each under the name that the file has for it."""
    config = json.loads((model.directory / CONFIG).read_text(encoding="utf-8"))
    aliases = {key: alias for alias, key in getattr(model.config, "attribute_map", {}).items()}
    for key, value in changes.items():
        config.pop(aliases.get(key, ""), None)
        config[key] = value
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")


def _renamed(anatomy: Anatomy, keep: Sequence[int]) -> dict[str, str]:
    """The new name of each block that stays."""
    stem = anatomy.blocks[0].rpartition(".")[0] if anatomy.blocks else ""
    return {anatomy.blocks[old]: f"{stem}.{new}" for new, old in enumerate(keep)}


def _shapes(
    anatomy: Anatomy, dimensions: Dimensions | None, keep: Sequence[int], units: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape after a cut."""
    renamed = _renamed(anatomy, keep)
    found = {}
    for name, shape in anatomy.parameter_shapes.items():
        block = anatomy.block_of(name)
        if block is not None and block not in renamed:
            continue
        new = list(shape)
        for axis in dimensions.axes_of(name, anatomy) if dimensions else ():
            if dimensions and axis.kind in units:
                new[axis.axis] = new[axis.axis] // dimensions.widths[axis.kind].units * units[axis.kind]
        found[name if block is None else renamed[block] + name.removeprefix(block)] = tuple(new)
    return found


def _note(surgery: Surgery, name: str, anatomy: Anatomy) -> str:
    assert surgery.dimensions is not None
    widths = surgery.dimensions.widths
    kinds = dict.fromkeys(
        a.kind for a in surgery.dimensions.axes_of(name, anatomy) if a.kind in surgery.units
    )
    parts = [f"{surgery.units[kind]} of {widths[kind].units} {UNITS[kind]}" for kind in kinds]
    return f"{' and '.join(parts)} kept"


def _record(target: str, weight: Tensor, note: str) -> LayerRecord:
    return LayerRecord(
        name=target.removesuffix(".weight"),
        zero_fraction=float((weight == 0).float().mean()),
        bits=8.0 * weight.element_size(),
        note=note,
    )
