"""The run of a one-shot pruner: block by block, with statistics where the method asks for any."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from compresskit.calibration.oneshot import calibration_rows, length_faults
from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.walk import walk
from compresskit.errors import PatternError
from compresskit.modeling.streaming import StreamedModel
from compresskit.sparse import PRUNERS
from compresskit.sparse.pattern import parse_pattern
from compresskit.sparse.promise import Zeros
from compresskit.stage import LayerRecord, StageResult

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.stage import Prune
    from compresskit.stage import StageContext


def run_oneshot(stage: Prune, model: ModelSource, context: StageContext) -> StageResult:
    """Zero weights of ``model`` into ``context.out``.

    A layer that is quantised already keeps its grid: zeros are on it, and weights that stay do not move.

    Args:
        stage: what to do.
        model: a dense checkpoint.
        context: where to write and what to calibrate on; a method without needs reads no data.

    Returns:
        A promise of zeros and a record for each layer pruned; layers skipped are named in a warning.

    Raises:
        PatternError: the pattern does not fit a layer, or the targets are wrong.
        DataError: the calibration data cannot be read.
        StatisticError: calibration measured nothing usable.
    """
    cls: Any = PRUNERS[stage.method]
    faults = stage.pattern_faults(model, "prune")
    if cls.needs:
        faults += length_faults(stage, model.config, "prune")
    if faults:
        raise PatternError(*faults)
    method = cls(pattern=parse_pattern(str(stage.pattern)), **dict(stage.options))
    layers = stage.layers(model)
    records: dict[str, LayerRecord] = {}
    counts = [0, 0]

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        grid = model.grid(layer)
        done = method.prune(weight_OI, stats)
        new_OI: Tensor = done.weight_OI
        if grid is not None:
            new_OI = grid.snap(new_OI).to(weight_OI.device)
        zeros = int((new_OI == 0).sum())
        counts[0] += zeros
        counts[1] += new_OI.numel()
        bits = 8.0 * weight_OI.element_size() if grid is None else grid.bits_per_weight(weight_OI.shape[1])
        records[layer] = LayerRecord(
            name=layer, zero_fraction=zeros / new_OI.numel(), bits=bits, note=done.note
        )
        return new_OI

    rows, spill, warnings = None, None, skipped(stage, model, layers)
    if method.needs:
        rows, spill, said = calibration_rows(
            stage, model, context.data, cache=context.cache, scratch=context.scratch
        )
        warnings += said
    elif stage.data is not None:
        warnings.append(f"{stage.method} reads no data; the data given to it was left unread.")
    with StreamedModel(model, context.out, device=context.device, dtype=context.dtype) as streamed:
        walked = walk(
            streamed, cast(Any, rows), visit, method.needs, layers=layers, title="pruning", spill=spill
        )
    return StageResult(
        promises=tuple(Zeros(layer=layer, pattern=str(stage.pattern)) for layer in layers),
        layers=tuple(replace(records[n], relative_error=walked.relative_error[n]) for n in layers),
        metrics={"zero_fraction": counts[0] / counts[1], "calibration_tokens": walked.num_tokens},
        warnings=(*warnings, *walked.warnings),
    )


def skipped(stage: Prune, model: ModelSource, layers: tuple[str, ...]) -> list[str]:
    """Layers that the targets name and the pattern does not fit, in one sentence."""
    named = stage.named(model)
    left = [layer for layer in named if layer not in set(layers)]
    if not left:
        return []
    return [f"{stage.pattern} does not fit {len(left)} layers, which stay dense: {', '.join(left)}."]
