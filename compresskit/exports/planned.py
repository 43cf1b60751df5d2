"""What can be told of a recipe's exports before it runs: bytes on disk, where zeros make them fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from compresskit.exports.bitmask import foresee
from compresskit.modeling import Linear, ModelSource
from compresskit.quant.scheme import parse
from compresskit.sparse.pattern import Block, LayerUnstructured, Pattern, parse_pattern
from compresskit.stage import Outlook, Promise

BITMASK = "bitmask"
UNIFORM = "uniform"


def export_notes(
    targets: Sequence[str],
    stages: Sequence[Any],
    promises: Iterable[Promise],
    last: Outlook,
    source: ModelSource,
) -> tuple[str, ...]:
    """Sentences on what the targets of a plan will take.

    Args:
        targets: names of ``compresskit.exports.EXPORTS``.
        stages: of the plan: each has ``stage`` and ``zeroed``, the layers whose zeros it makes.
        promises: of the stages that made the model before.
        last: the model after the last stage.
        source: the model before the first.
    """
    if BITMASK not in targets:
        return ()
    kept = kept_of(stages, promises, last)
    total, dense, packed = foresee(last.anatomy, _forms(stages, last, source), kept, _schemes(last))
    names = f"{len(packed)} of {len(last.anatomy.linears)} linear layers are packed"
    if not packed:
        return (f"export {BITMASK}: {total:,} bytes of weights; nothing is packed: too few zeros.",)
    return (
        f"export {BITMASK}: {_bound(stages, last)}{total:,} bytes of weights, {total / dense:.3f}x of the "
        f"{dense:,} that they take dense; {names}.",
    )


def kept_of(stages: Sequence[Any], promises: Iterable[Promise], last: Outlook) -> dict[str, int]:
    """Layer -> how many of its weights the patterns leave, of every layer that has one."""
    kept: dict[str, int] = {}
    linears = last.anatomy.linears
    said = [(promise.layer, parse_pattern(promise.pattern)) for promise in _zeros(promises)]
    for planned in stages:
        for name in planned.zeroed:
            pattern, fitted = parse_pattern(planned.stage.pattern), getattr(planned.stage, "fitted", None)
            said.append((name, fitted(pattern, linears[name]) if fitted else pattern))
    for name, pattern in said:
        if name in linears:
            left = _kept(pattern, linears[name])
            kept[name] = min(left, kept.get(name, left))
    return kept


def _zeros(promises: Iterable[Promise]) -> list[Any]:
    return [promise for promise in promises if promise.kind == "zeros"]


def _kept(pattern: Pattern, linear: Linear) -> int:
    """How many weights of a layer ``pattern`` leaves."""
    rows, inputs = linear.out_features, linear.in_features
    if isinstance(pattern, LayerUnstructured):
        return rows * inputs - round(pattern.zero_fraction * rows * inputs)
    if isinstance(pattern, Block):
        blocks = pattern.count(rows, inputs)
        return (blocks - round(pattern.zero_fraction * blocks)) * pattern.rows * pattern.columns
    return rows * int(pattern.keep_largest(torch.arange(inputs, dtype=torch.float32)[None] + 1).sum())


def _forms(
    stages: Sequence[Any], last: Outlook, source: ModelSource
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Every tensor of the model after the last stage, of tied ones the first, as it is stored."""
    shapes = dict(last.anatomy.parameter_shapes)
    if not any(planned.reshapes for planned in stages):  # buffers are no parameters
        shapes |= {name: source.shape(name) for name in source.names()}
    for group in last.anatomy.tied:
        for name in group[1:]:
            shapes.pop(name, None)
    plain = source.compute_dtype
    return {name: (source.dtype(name) if name in source else plain, shape) for name, shape in shapes.items()}


def _schemes(last: Outlook) -> Mapping[str, Any]:
    """Of a layer that may get one of several, the one of most bits."""
    return {
        name: max((parse(text) for text in texts), key=lambda scheme: scheme.weight_bits)
        for name, texts in last.layer_schemes.items()
    }


def _bound(stages: Sequence[Any], last: Outlook) -> str:
    """How the figure is meant: exact where patterns alone say how many zeros there are."""
    divided = [p.stage for p in stages if p.zeroed and hasattr(p.stage, "division")]
    blocks = [p for p in stages if p.zeroed and isinstance(parse_pattern(p.stage.pattern), Block)]
    padded = any(
        getattr(p.stage, "on_indivisible", "") == "pad" for p in blocks
    )  # blocks at the end are short
    if padded or any(stage.division.method != UNIFORM for stage in divided):
        return "about "
    return "at most " if last.layer_schemes else ""
