"""What an allocation sees of a model, and the patterns that come of the fractions it names.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compresskit.calibration.costs import costs_of
from compresskit.calibration.rows import Row
from compresskit.calibration.sensitivity import Change
from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.walk import walk
from compresskit.modeling import load_model, resolve_device
from compresskit.modeling.streaming import StreamedModel
from compresskit.sparse.base import Survey
from compresskit.sparse.pattern import Block, Pattern, RowUnstructured, parse_pattern
from compresskit.sparse.wanda import Wanda

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import StageContext

SHIFTS = 60
"""Halvings of an interval of 2: as exact as a float is."""


def scorer_of(method: Any) -> Any:
    """``method`` where it has scores that are known before anything is pruned, else Wanda."""
    return method if hasattr(method, "score") else Wanda(pattern=method.pattern)


def _said_of(scorer: Any) -> str:
    """All that ``scorer`` makes scores by: where it comes from and its fields.

    Of the package's own the pattern is none of it; another one's code may read it, and may change.
    """
    cls = type(scorer)
    is_ours = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    names = [field.name for field in fields(scorer) if not (is_ours and field.name == "pattern")]
    source = "" if is_ours else sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    said = {name: getattr(scorer, name) for name in names}
    return f"{cls.__module__}.{cls.__qualname__} {said} {source}"


def survey(
    model: ModelSource,
    patterns: Mapping[str, Pattern],
    method: Any,
    rows: Sequence[Row] | None,
    context: StageContext,
    spill: Path | None,
) -> Survey:
    """Look at ``model`` as it is, which is walked through once where scores take calibration.

    Args:
        model: a dense checkpoint.
        patterns: layer to prune -> where its zeros may go: anywhere, or in blocks.
        method: the pruner.
        rows: to calibrate on; None where :func:`scorer_of` ``method`` needs none and no cost is asked for.
        context: of the stage.
        spill: a file for hidden states, where they are too many for memory.
    """
    scorer, linears = scorer_of(method), model.anatomy.linears
    device = resolve_device(context.device)
    stats: dict[str, LayerStats] = {}

    def keep(layer: str, weight_OI: Tensor, found: LayerStats) -> None:
        stats[layer] = replace(found, sample_NI=None, shared={})

    if scorer.needs:
        with StreamedModel(model, None, device=context.device, dtype=context.dtype) as streamed:
            walk(
                streamed,
                rows,
                keep,
                scorer.needs,
                layers=tuple(patterns),
                true_sequential=False,
                title="surveying",
                spill=spill,
            )

    def score(layer: str, weight_OI: Tensor | None = None) -> Tensor:
        weight_OI = model.weight_OI(layer).to(device) if weight_OI is None else weight_OI
        found: Tensor = scorer.score(weight_OI, stats.get(layer))
        return found

    def chosen_among(layer: str) -> Tensor:
        pattern = patterns[layer]
        return pattern.summed(score(layer)) if isinstance(pattern, Block) else score(layer)

    return Survey(
        sizes={name: (linears[name].out_features, linears[name].in_features) for name in patterns},
        blocks={name: linears[name].block for name in patterns},
        zero_fraction=method.pattern.zero_fraction,
        score=score,
        chosen_among=chosen_among,
        cost=partial(_costs, model, patterns, scorer, score, rows or (), context),
    )


def _costs(
    model: ModelSource,
    patterns: Mapping[str, Pattern],
    scorer: Any,
    score: Callable[[str, Tensor], Tensor],
    rows: Sequence[Row],
    context: StageContext,
    levels: Mapping[str, Sequence[float]],
) -> dict[str, dict[float, float]]:
    """See ``Survey.cost``."""

    def at_level(layer: str, level: float) -> Pattern:
        linear = model.anatomy.linears[layer]
        _, room = _portions(patterns[layer], linear.out_features, linear.in_features)
        return _with_fraction(patterns[layer], _within(level, room) / room)

    def pruned(layer: str, weight_OI: Tensor, level: float) -> Tensor:
        return weight_OI.where(at_level(layer, level).keep_largest(score(layer, weight_OI)), 0)

    kind = f"pruning by {_said_of(scorer)}"
    change = Change(kind, "prunings", lambda layer, level: str(at_level(layer, level)), pruned)
    loaded = load_model(
        model, dtype=context.dtype, device=context.device, trust_remote_code=context.trust_remote_code
    )
    return costs_of(loaded, model, levels, rows, change, cache=context.cache, scratch=context.scratch)


def patterns_of(
    patterns: Mapping[str, Pattern], fractions: Mapping[str, float], found: Survey
) -> dict[str, Pattern]:
    """The pattern of each layer: together they have the zeros asked for, to one portion.

    Args:
        patterns: layer -> that with the zeros of all layers together; not N:M.
        fractions: layer -> zero fraction.
        found: the survey that they come from.

    Returns:
        Layer -> a pattern like that of ``patterns``, of at least one zero and one weight in each row or
        layer, or block of a layer.
    """
    portion, room = {}, {}
    for name, (rows, inputs) in found.sizes.items():
        portion[name], room[name] = _portions(patterns[name], rows, inputs)
    total = found.zero_fraction * sum(portion[n] * room[n] for n in room)
    low, high = -1.0, 1.0
    for _ in range(SHIFTS):  # what limits leave over, all others share
        middle = (low + high) / 2
        come = sum(portion[n] * _within(fractions[n] + middle, room[n]) for n in room)
        low, high = (middle, high) if come < total else (low, middle)
    wanted = {n: _within(fractions[n] + high, room[n]) for n in room}
    counts = {n: int(count) for n, count in wanted.items()}
    still = total - sum(portion[n] * counts[n] for n in room)
    for name in sorted(room, key=lambda n: counts[n] - wanted[n]):
        if portion[name] <= 2 * still and counts[name] < room[name] - 1:
            counts[name] += 1
            still -= portion[name]
    return {n: _with_fraction(patterns[n], counts[n] / room[n]) for n in room}


def _portions(pattern: Pattern, rows: int, inputs: int) -> tuple[int, int]:
    """What zeros come in, as weights: an input in every row, one weight, or a block; how many there are."""
    if isinstance(pattern, RowUnstructured):
        return rows, inputs
    if isinstance(pattern, Block):
        return pattern.rows * pattern.columns, pattern.count(rows, inputs)
    return 1, rows * inputs


def _with_fraction(pattern: Any, zero_fraction: float) -> Pattern:
    """``pattern`` with other zeros, as its text has it."""
    return parse_pattern(str(replace(pattern, zero_fraction=zero_fraction)))


def _within(fraction: float, room: int) -> float:
    """So many of ``room``, at least one and not all."""
    return min(max(fraction * room, 1.0), room - 1.0)
