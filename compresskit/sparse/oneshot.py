"""The run of a one-shot pruner: block by block, with statistics where the method asks for any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from compresskit.calibration.oneshot import calibration_rows, length_faults
from compresskit.calibration.refine import Component
from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.walk import walk
from compresskit.errors import PatternError
from compresskit.modeling.streaming import StreamedModel
from compresskit.progress import say
from compresskit.sparse import ALLOCATIONS, PRUNERS
from compresskit.sparse.base import Recovered
from compresskit.sparse.pattern import Pattern, parse_pattern
from compresskit.sparse.promise import Zeros
from compresskit.sparse.stage import UNIFORM
from compresskit.sparse.survey import patterns_of, survey
from compresskit.stage import LayerRecord, StageResult

if TYPE_CHECKING:
    from compresskit.data.pack import TokenRows
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
        A promise of zeros and a record for each layer pruned; a warning counts the layers that were
        skipped or padded, and names ten.

    Raises:
        PatternError: the pattern does not fit a layer, or the targets are wrong.
        DataError: the calibration data cannot be read.
        StatisticError: calibration measured nothing usable.
    """
    faults = stage.pattern_faults(model, "prune")
    if stage.reads_data:
        faults += length_faults(stage, model.config, "prune")
    if faults:
        raise PatternError(*faults)
    layers = stage.layers(model)
    rows, spill, warnings = None, None, stage.uneven(model)
    if stage.reads_data:
        rows, spill, said = calibration_rows(
            stage, model, context.data, cache=context.cache, scratch=context.scratch
        )
        warnings += said
    elif stage.data is not None:
        warnings.append(f"{stage.method} reads no data; the data given to it was left unread.")
    cls: Any = PRUNERS[stage.method]
    method = cls(pattern=parse_pattern(str(stage.pattern)), **dict(stage.options))
    patterns = _patterns(stage, model, layers, method, rows, context, spill)
    run = _Run(model, method, patterns, stage.recovery)
    with StreamedModel(model, context.out, device=context.device, dtype=context.dtype) as streamed:
        walked = walk(
            streamed,
            cast(Any, rows),
            run.visit,
            method.needs,
            layers=layers,
            refine=None if stage.recovery is None else run,
            true_sequential=stage.true_sequential,
            title="pruning",
            spill=spill,
        )
    return StageResult(
        promises=tuple(Zeros(layer=layer, pattern=str(patterns[layer])) for layer in layers),
        layers=tuple(
            # What pruning a layer did to its output is not what it does once it was retrained.
            replace(run.records[n], relative_error=None if n in run.retrained else walked.relative_error[n])
            for n in layers
        ),
        metrics={
            "zero_fraction": run.zeros / run.weights,
            "calibration_tokens": walked.num_tokens,
            **({"recovered": run.recovered} if run.recovered else {}),
        },
        warnings=(*warnings, *walked.warnings),
    )


class _Run:
    """What is done to layers and components, and what is found in doing it."""

    def __init__(
        self, model: ModelSource, method: Any, patterns: Mapping[str, Pattern], recovery: Any
    ) -> None:
        self.model, self.method, self.patterns, self.recovery = model, method, patterns, recovery
        self.records: dict[str, LayerRecord] = {}
        self.recovered: dict[str, dict[str, float]] = {}
        self.retrained: set[str] = set()
        self.zeros = self.weights = 0

    def visit(self, layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        """Prune one layer; see ``walk.Visit``."""
        grid = self.model.grid(layer)
        done = replace(self.method, pattern=self.patterns[layer]).prune(weight_OI, stats)
        new_OI: Tensor = done.weight_OI
        if grid is not None:
            new_OI = grid.snap(new_OI).to(weight_OI.device)
        zeros = int((new_OI == 0).sum())
        self.zeros += zeros
        self.weights += new_OI.numel()
        bits = 8.0 * weight_OI.element_size() if grid is None else grid.bits_per_weight(weight_OI.shape[1])
        self.records[layer] = LayerRecord(
            name=layer, zero_fraction=zeros / new_OI.numel(), bits=bits, note=done.note
        )
        return new_OI

    @property
    def passes(self) -> int:
        """See ``refine.Refine``."""
        return int(self.recovery.passes)

    def __call__(self, component: Component) -> Mapping[str, Tensor]:
        """Recover a component; see ``refine.Refine``."""
        done: Recovered = self.recovery.recover(component)
        self.recovered[component.name] = {"error_before": done.before, "error_after": done.after}
        self.retrained |= {layer for layer in component.layers if f"{layer}.weight" in done.parameters}
        note = f"output error of {component.name} {done.before:.4f} before recovery, {done.after:.4f} after"
        for layer in component.layers:
            record = self.records[layer]
            self.records[layer] = replace(record, note="; ".join(filter(None, (record.note, note))))
        return done.parameters


def _patterns(
    stage: Prune,
    model: ModelSource,
    layers: Sequence[str],
    method: Any,
    rows: TokenRows | None,
    context: StageContext,
    spill: Path | None,
) -> dict[str, Pattern]:
    """The pattern of each layer; told as zeros are divided."""
    linears = model.anatomy.linears
    patterns = {name: stage.fitted(method.pattern, linears[name]) for name in layers}
    if stage.division.method == UNIFORM:
        return patterns
    allocation = ALLOCATIONS[stage.division.method](**dict(stage.division.options))
    seen = survey(model, patterns, method, cast(Any, rows), context, spill)
    patterns = patterns_of(patterns, allocation.fractions(seen), seen)
    say(f"zeros divided by {stage.division.method}:")
    for layer, pattern in patterns.items():
        say(f"  {layer}: {pattern.zero_fraction:.1%}")
    return patterns
