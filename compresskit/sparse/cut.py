"""Cut: take whole blocks and feed-forward neurons away; what is left is an ordinary, smaller model.

Paper: blocks evenly spaced, the first and the last kept: Sanh et al., "DistilBERT", 2019,
https://arxiv.org/abs/1910.01108. Neurons by the joint magnitude of all weights that belong to one:
Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900.

Shapes: O = out_features, I = in_features, N = neurons of a feed-forward network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compresskit.errors import Fault, InputError, PatternError
from compresskit.formats.checkpoint import write_shards
from compresskit.modeling import copy_sidecars
from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.progress import Progress
from compresskit.sparse.coupling import Coupling, find_couplings
from compresskit.sparse.pattern import smallest
from compresskit.sparse.resize import resized, with_blocks, with_shapes
from compresskit.stage import Forecast, LayerRecord, Outlook, StageResult

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import StageContext

NEURON_MULTIPLE = 8
SHARD_BYTES = 1 << 28
CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Structured pruning without data; a short training stage afterwards wins most of the quality back.

    Attributes:
        layers: blocks to keep, evenly spaced, the first and the last among them; None keeps all.
        ffn: fraction of each feed-forward network's neurons to keep, rounded to a multiple of 8; None keeps
            all.
    """

    layers: int | None = None
    ffn: float | None = None

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong for such a ``model``; reads no weight."""
        faults, blocks = [], len(model.anatomy.blocks)
        if self.layers is None and self.ffn is None:
            faults.append(
                Fault(where, "layers or ffn", "neither", "Say how many layers to keep, or ffn: 0.5.")
            )
        if self.layers is not None and not 1 <= self.layers < blocks:
            cure = "Give how many layers to keep."
            faults.append(Fault(f"{where}.layers", f"1 to {blocks - 1} of {blocks}", str(self.layers), cure))
        if self.ffn is not None and not 0 < self.ffn < 1:
            cure = "Give the fraction of neurons to keep, such as 0.5."
            faults.append(Fault(f"{where}.ffn", "a number between 0 and 1", str(self.ffn), cure))
        if faults:
            return faults
        try:
            plan_cut(
                self, model.config, model.anatomy, model.original, trust_remote_code=model.trust_remote_code
            )
        except InputError as error:
            faults = [
                Fault(f"{where}.{f.where}" if f.where == "ffn" else f.where, f.expected, f.got, f.cure)
                for f in error.faults
                if isinstance(f, Fault)
            ]
        return faults

    def forecast(self, model: Outlook) -> Forecast:
        """What the smaller model will be; called only when there are no faults."""
        trust = model.trust_remote_code
        surgery = plan_cut(self, model.config, model.anatomy, model.original, trust_remote_code=trust)
        config = resized(model.config, surgery.changes)
        skeleton = skeleton_of(config, model.original, trust_remote_code=trust)
        after = replace(model, anatomy=anatomy_of(skeleton), config=config, layer_bits={}, layer_schemes={})
        dropped = len(model.anatomy.blocks) - len(surgery.blocks)
        touched = len(surgery.blocks) * (1 + len(surgery.coupling.makers)) if surgery.coupling else 0
        sizes = [4 * prod(shape) for shape in model.anatomy.parameter_shapes.values()]
        first = model.anatomy.blocks[0] + "."
        shapes = model.anatomy.parameter_shapes
        # Neurons are found with one block in float32.
        probe = sum(4 * prod(s) for n, s in shapes.items() if n.startswith(first)) if self.ffn else 0
        return Forecast(
            after=after,
            layers=touched,
            memory_bytes=max(min(after.checkpoint_bytes, SHARD_BYTES) + 3 * max(sizes), probe),
            notes=(f"{dropped} of {len(model.anatomy.blocks)} blocks go.",) if dropped else (),
        )

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Write the smaller model into ``context.out``.

        Args:
            model: a dense checkpoint with no pattern or grid to keep.
            context: its ``out`` gets a complete model whose config.json tells the new sizes.

        Returns:
            One record per layer that lost neurons.

        Raises:
            PatternError: an earlier stage promised zeros or a grid, which a cut would break.
            ModelError: no key of the configuration sets what is to be cut, or no neurons can be told apart.
        """
        held = sorted({p.kind for p in context.promises} & {"zeros", "grid"})
        if held:
            got = f"earlier promises of {' and '.join(held)}"
            raise PatternError(
                Fault("cut", "a model without zeros or grids to keep", got, "Put the cut first.")
            )
        surgery = plan_cut(
            self, model.config, model.anatomy, model.directory, trust_remote_code=model.trust_remote_code
        )
        records: list[LayerRecord] = []
        with Progress("cutting", len(surgery.blocks), unit="blocks") as progress:
            write_shards(context.out, _tensors(model, surgery, records, progress), shard_bytes=SHARD_BYTES)
        _write_config(model, surgery.changes, context.out)
        copy_sidecars(model.directory, context.out)
        return StageResult(
            layers=tuple(records),
            metrics={
                "blocks_kept": list(surgery.blocks),
                "neurons_before": surgery.coupling.neurons if surgery.coupling else None,
                "neurons_kept": surgery.neurons,
            },
        )


@dataclass(frozen=True, slots=True)
class Surgery:
    """What a cut takes out of one model.

    Attributes:
        blocks: indices of those kept.
        coupling: where the neurons are; None where all are kept.
        neurons: kept in each block.
        changes: of config.json.
    """

    blocks: tuple[int, ...]
    coupling: Coupling | None
    neurons: int | None
    changes: dict[str, Any]


def spaced(count: int, keep: int) -> tuple[int, ...]:
    """``keep`` of ``count`` indices, evenly spaced, the first and (from two on) the last among them."""
    if keep == 1:
        return (0,)
    return tuple((2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep))


def plan_cut(
    cut: Cut, config: Any, anatomy: Anatomy, directory: Path, *, trust_remote_code: bool = False
) -> Surgery:
    """Find what ``cut`` means for a model; reads no weight.

    Raises:
        ModelError: no key of the configuration sets what is to be cut, or no neurons can be told apart.
        PatternError: rounding leaves every neuron where it is.
    """
    blocks = tuple(range(len(anatomy.blocks)))
    changes: dict[str, Any] = {}
    if cut.layers is not None:
        blocks = spaced(len(blocks), cut.layers)
        changes = with_blocks(config, anatomy, directory, blocks, trust_remote_code=trust_remote_code)
    if cut.ffn is None:
        return Surgery(blocks, None, None, changes)
    couplings = find_couplings(config, anatomy, directory, trust_remote_code=trust_remote_code)
    if len(couplings) != 1:
        got = f"{len(couplings)} such layers" if couplings else "no layer that reads neurons"
        expected = "one linear layer in each block that reads neurons made by others"
        raise PatternError(Fault("ffn", expected, got, "Cut layers only, or another model."))
    old = couplings[0].neurons
    new = max(NEURON_MULTIPLE, int(cut.ffn * old / NEURON_MULTIPLE + 0.5) * NEURON_MULTIPLE)
    if new >= old:
        expected = f"fewer than {old} neurons after rounding to a multiple of {NEURON_MULTIPLE}"
        raise PatternError(Fault("ffn", expected, f"{new} for {cut.ffn}", "Lower ffn."))
    middle = resized(config, changes)
    skeleton = skeleton_of(middle, directory, trust_remote_code=trust_remote_code)
    shapes = _shapes_after(anatomy_of(skeleton), couplings[0], new)
    changes |= with_shapes(middle, directory, old, new, shapes, trust_remote_code=trust_remote_code)
    return Surgery(blocks, couplings[0], new, changes)


def _shapes_after(anatomy: Anatomy, coupling: Coupling, new: int) -> dict[str, tuple[int, ...]]:
    shapes = dict(anatomy.parameter_shapes)
    for block in anatomy.blocks:
        for name, axis, times in _parts(anatomy, block, coupling):
            shape = list(shapes[name])
            shape[axis] = new * times
            shapes[name] = tuple(shape)
    return shapes


def _parts(anatomy: Anatomy, block: str, coupling: Coupling) -> Iterator[tuple[str, int, int]]:
    """Each parameter that neurons of ``block`` lie in: name, axis, entries of that axis per neuron."""
    for maker, times in coupling.makers:
        linear = anatomy.linears[f"{block}.{maker}"]
        yield f"{linear.name}.weight", 1 if linear.transposed else 0, times
        if linear.has_bias:
            yield f"{linear.name}.bias", 0, times
    down = anatomy.linears[f"{block}.{coupling.down}"]
    yield f"{down.name}.weight", 0 if down.transposed else 1, 1


def strongest(model: ModelSource, block: str, coupling: Coupling, count: int) -> Tensor:
    """The neurons of ``block`` whose weights, all that belong to one taken together, are largest.

    Args:
        model: the checkpoint to read.
        block: its name.
        coupling: where the neurons are.
        count: how many.

    Returns:
        int64 (``count``,), ascending.
    """
    score_N = torch.zeros(coupling.neurons)
    for name, axis, times in _parts(model.anatomy, block, coupling):
        if name.endswith(".weight"):
            weight = model.tensor(name).float().movedim(axis, 0)
            score_N += weight.square().sum(1).view(times, -1).sum(0)
    return (~smallest(score_N, coupling.neurons - count)).nonzero().flatten()


def _tensors(
    model: ModelSource, surgery: Surgery, records: list[LayerRecord], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the smaller model, read one at a time; fills ``records`` as it goes."""
    anatomy = model.anatomy
    stem = anatomy.blocks[0].rpartition(".")[0] if anatomy.blocks else ""
    renamed = {anatomy.blocks[old]: f"{stem}.{new}" for new, old in enumerate(surgery.blocks)}
    entered: str | None = None
    keep_N = torch.empty(0, dtype=torch.int64)
    parts: dict[str, tuple[int, int]] = {}
    for name in model.names():
        block = anatomy.block_of(name)
        if block is None:
            yield name, model.tensor(name)
            continue
        if block not in renamed:
            continue
        if block != entered:
            entered = block
            progress.advance(note=block)
            if surgery.coupling and surgery.neurons:
                keep_N = strongest(model, block, surgery.coupling, surgery.neurons)
                parts = {n: (axis, times) for n, axis, times in _parts(anatomy, block, surgery.coupling)}
        tensor, target = model.tensor(name), renamed[block] + name.removeprefix(block)
        if name in parts and surgery.coupling:
            axis, times = parts[name]
            index = torch.cat([keep_N + i * surgery.coupling.neurons for i in range(times)])
            tensor = tensor.index_select(axis, index)
            if name.endswith(".weight"):
                note = f"{surgery.neurons} of {surgery.coupling.neurons} neurons kept"
                records.append(_record(target, tensor, note))
        yield target, tensor


def _record(target: str, weight: Tensor, note: str) -> LayerRecord:
    return LayerRecord(
        name=target.removesuffix(".weight"),
        zero_fraction=float((weight == 0).float().mean()),
        bits=8.0 * weight.element_size(),
        note=note,
    )


def _write_config(model: ModelSource, changes: dict[str, Any], out: Path) -> None:
    config = json.loads((model.directory / CONFIG).read_text(encoding="utf-8"))
    aliases = {key: alias for alias, key in getattr(model.config, "attribute_map", {}).items()}
    for key, value in changes.items():
        config.pop(aliases.get(key, ""), None)
        config[key] = value
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")
