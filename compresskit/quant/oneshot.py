"""The run of a one-shot quantizer: block by block, every weight onto its grid, the grids beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from compresskit.calibration.costs import costs_of
from compresskit.calibration.oneshot import calibration_rows, length_faults
from compresskit.calibration.rows import Row
from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.walk import walk
from compresskit.errors import SchemeError
from compresskit.formats.grid import Grid, write_grids
from compresskit.modeling import load_model
from compresskit.modeling.streaming import StreamedModel
from compresskit.progress import say
from compresskit.quant import QUANTIZERS
from compresskit.quant.affine import activation_scale
from compresskit.quant.auto import Chosen, choose, rounding
from compresskit.quant.balance import balance
from compresskit.quant.base import Quantized
from compresskit.quant.known import known
from compresskit.quant.promise import OnGrid
from compresskit.stage import LayerRecord, StageResult

if TYPE_CHECKING:
    from compresskit.data.pack import TokenRows
    from compresskit.modeling.source import ModelSource
    from compresskit.quant.stage import Quantize
    from compresskit.stage import StageContext

CHUNK = 1024
"""Rows of a weight that are compared with their former values at a time."""


def run_oneshot(stage: Quantize, model: ModelSource, context: StageContext) -> StageResult:
    """Put weights of ``model`` onto grids, into ``context.out``.

    Args:
        stage: what to do.
        model: a dense checkpoint; the layers to quantise have no grid yet.
        context: where to write and what to calibrate on; a method without needs reads no data.

    Returns:
        A promise of a grid and a record for each layer.

    Raises:
        SchemeError: the scheme does not fit a layer, a layer is quantised already, or the targets are wrong.
        DataError: the calibration data cannot be read.
        StatisticError: calibration measured nothing usable.
    """
    cls: Any = QUANTIZERS[stage.method]
    faults = stage.scheme_faults(model, "quantize")
    if not faults and stage.reads_data:
        faults += length_faults(stage, model.config, "quantize")
    if faults:
        raise SchemeError(*faults)
    method = cls(**dict(stage.options))
    rows, spill, warnings = _rows(stage, model, context)
    chosen = _choose(stage, model, context, cast(Any, rows)) if stage.is_auto else None
    schemes = stage.schemes(model.anatomy) if chosen is None else chosen.schemes
    layers = [name for name in model.anatomy.linears if name in schemes]
    prepare = balance(method, schemes)
    log = _Log({n: g for n in model.anatomy.linears if (g := model.grid(n)) is not None})

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        done = method.quantize(weight_OI, schemes[layer], stats)
        if schemes[layer].static:
            largest_I = stats.require("input_abs_max", weight_OI.shape[1])
            scale = activation_scale(largest_I, weight_OI.dtype)
            done = replace(done, grid=replace(done.grid, activation_scale=scale))
        log.add(layer, weight_OI, done)
        return cast(Tensor, done.weight_OI)

    needs = method.needs | ({"input_abs_max"} if any(s.static for s in schemes.values()) else set())
    with StreamedModel(model, context.out, device=context.device, dtype=context.dtype) as streamed:
        walked = walk(
            streamed,
            cast(Any, rows),
            visit,
            needs,
            layers=layers,
            prepare=prepare,
            title="quantising",
            spill=spill,
        )
        # Before the model is closed, which would carry the source's grids over.
        write_grids(context.out, log.grids)
    metrics: dict[str, Any] = {
        "weight_relative_error": log.relative_error,
        "calibration_tokens": walked.num_tokens,
    }
    if chosen is not None:
        metrics |= {"chosen": str(chosen), "bits": chosen.bits}
    return StageResult(
        promises=tuple(OnGrid(layer=layer, scheme=str(schemes[layer])) for layer in layers),
        layers=tuple(replace(log.records[n], relative_error=walked.relative_error[n]) for n in layers),
        metrics=metrics,
        warnings=(*warnings, *walked.warnings) + (prepare.warnings if prepare is not None else ()),
    )


class _Log:
    """What was done to each layer; ``grids`` begins with those of earlier stages."""

    def __init__(self, grids: dict[str, Grid]) -> None:
        self.grids = grids
        self.records: dict[str, LayerRecord] = {}
        self._changed = self._total = 0.0

    def add(self, layer: str, weight_OI: Tensor, done: Quantized) -> None:
        self.grids[layer] = done.grid
        for start in range(0, len(weight_OI), CHUNK):
            former_OI = weight_OI[start : start + CHUNK].float()
            self._changed += float((done.weight_OI[start : start + CHUNK].float() - former_OI).square().sum())
            self._total += float(former_OI.square().sum())
        self.records[layer] = LayerRecord(
            name=layer,
            zero_fraction=1 - int(done.weight_OI.count_nonzero()) / weight_OI.numel(),
            bits=done.grid.bits_per_weight(weight_OI.shape[1]),
            note=done.note,
        )

    @property
    def relative_error(self) -> float:
        return self._changed / self._total if self._total else 0.0


def _rows(
    stage: Quantize, model: ModelSource, context: StageContext
) -> tuple[TokenRows | None, Path | None, tuple[str, ...]]:
    """Calibration rows, a file for hidden states where they are many, and warnings."""
    if stage.reads_data:
        return calibration_rows(stage, model, context.data, cache=context.cache, scratch=context.scratch)
    if stage.data is not None:
        return None, None, (f"{stage.method} reads no data; the data given to it was left unread.",)
    return None, None, ()


def _choose(stage: Quantize, model: ModelSource, context: StageContext, rows: Sequence[Row]) -> Chosen:
    """The schemes of ``scheme: auto``; told as they are chosen."""
    anatomy, possible = model.anatomy, stage.possible(model.anatomy)
    free = {layer: schemes for layer, schemes in possible.items() if len(schemes) > 1}
    costs = {layer: {schemes[0]: 0.0} for layer, schemes in possible.items()}
    if free:
        loaded = load_model(
            model, dtype=context.dtype, device=context.device, trust_remote_code=context.trust_remote_code
        )
        change = rounding({n: model.dtype(f"{n}.weight") for n in free})
        costs |= costs_of(loaded, model, free, rows, change, cache=context.cache, scratch=context.scratch)
        del loaded
    chosen = choose(
        costs,
        {n: (anatomy.linears[n].out_features, anatomy.linears[n].in_features) for n in possible},
        cast(float, stage.target_bits),
        known(model).scale_bits,
        where="quantize",
    )
    say(f"chosen {chosen}")
    for layer, scheme in chosen.schemes.items():
        tried = ", ".join(f"{s} {cost:.5f}" for s, cost in costs[layer].items())
        say(f"  {layer}: {scheme} " + (f"(nats per token: {tried})" if layer in free else "(no other)"))
    return chosen
