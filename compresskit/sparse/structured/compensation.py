"""What units that go gave on average, put into the bias of the layer that read them.

Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), AAAI 2024,
https://arxiv.org/abs/2312.11983.

A layer without a bias gets one where a switch of the configuration gives it one, so that plain transformers
loads it; biases that come with it are zero. Which switch that is, is found by trying.

Shapes: O = out_features, I = in_features, U = units.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import Fault, PatternError
from compresskit.sparse.structured.base import Subject
from compresskit.sparse.structured.dense import walk_dense
from compresskit.sparse.structured.dimensions import FFN, HEADS, Dimensions
from compresskit.sparse.structured.resize import Changes
from compresskit.sparse.structured.surgery import Kept, Patient, Surgery

MEAN = "input_mean"


def with_biases(patient: Patient, dimensions: Dimensions, kinds: Collection[str]) -> tuple[Patient, Changes]:
    """The model with a bias on every layer that reads one of ``kinds``; reads no weight.

    Args:
        patient: a model.
        dimensions: its widths.
        kinds: those that are cut; hidden channels have no single reader, and do not count.

    Returns:
        The model, and what was changed in its configuration.

    Raises:
        PatternError: there is a layer that no switch gives a bias.
    """
    changes: Changes = {}
    for kind in cut_kinds(kinds):
        (reader,) = dimensions.widths[kind].readers
        layers = [f"{block}{reader}" for block in patient.anatomy.blocks]
        if all(patient.anatomy.linears[layer].has_bias for layer in layers):
            continue
        key = _switch(patient, layers)
        if key is None:
            expected = f"a bias on {reader.removeprefix('.')}, which reads {kind}"
            got = "none, and no switch of the configuration that gives it one"
            raise PatternError(Fault("compensate", expected, got, "Leave compensate out."))
        changes[key] = True
        config, anatomy = patient.after({key: True})
        patient = replace(patient, config=config, anatomy=anatomy)
    return patient, changes


def _switch(patient: Patient, layers: list[str]) -> str | None:
    """The key that is off and, when on, adds biases to linear layers, ``layers`` among them, and no more."""
    before = patient.anatomy.parameter_shapes
    values: dict[str, object] = patient.config.to_dict()
    for key in (key for key, value in values.items() if value is False):
        try:
            _, anatomy = patient.after({key: True})
        except Exception:  # whatever a model's constructor raises over a switch
            continue
        added = anatomy.parameter_shapes.keys() - before.keys()
        biases = {f"{name}.bias" for name in anatomy.linears}
        kept = all(anatomy.parameter_shapes.get(name) == shape for name, shape in before.items())
        if kept and added <= biases and {f"{layer}.bias" for layer in layers} <= added:
            return key
    return None


def compensate(subject: Subject, surgery: Surgery, kept: Kept) -> tuple[dict[str, Tensor], int]:
    """What to add to biases so that the readers of what goes give on average what they gave.

    Args:
        subject: with rows; the means are those of its dense model.
        surgery: what is cut.
        kept: which of it stays.

    Returns:
        For the bias of each reader in a block that stays: (O,), float64; and the number of tokens read.
    """
    model, dimensions, shifts = subject.model, surgery.dimensions, {}
    assert dimensions is not None
    readers = {dimensions.widths[kind].readers[0]: kind for kind in cut_kinds(surgery.units)}
    stay = {model.anatomy.blocks[index]: index for index in kept.blocks}

    def take(stats: Mapping[str, LayerStats]) -> None:
        for layer, found in stats.items():
            block = model.anatomy.block_of(layer) or ""
            kind = readers.get(layer.removeprefix(block))
            if kind is None or block not in stay:
                continue
            weight_OI = model.weight_OI(layer).double()
            mean_I = found.require(MEAN, weight_OI.shape[1]).double().cpu()
            keep_U = kept.units[kind][stay[block]]
            keep_I = keep_U.repeat_interleave(len(mean_I) // len(keep_U))
            shifts[f"{layer}.bias"] = weight_OI[:, ~keep_I] @ mean_I[~keep_I]

    seen = walk_dense(subject, frozenset({MEAN}), take)
    return shifts, seen.num_tokens


def cut_kinds(kinds: Collection[str]) -> list[str]:
    """Those of ``kinds`` that have a single reader, whose bias can stand for what goes."""
    return [kind for kind in (FFN, HEADS) if kind in kinds]
