"""The run of a one-shot quantizer: block by block, every weight onto its grid, the grids beside."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from compresskit.calibration.oneshot import calibration_rows, length_faults
from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.walk import walk
from compresskit.errors import SchemeError
from compresskit.formats.grid import Grid, write_grids
from compresskit.modeling.streaming import StreamedModel
from compresskit.quant import QUANTIZERS
from compresskit.quant.promise import OnGrid
from compresskit.quant.scheme import parse
from compresskit.stage import LayerRecord, StageResult
from compresskit.targets import select

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.quant.stage import Quantize
    from compresskit.stage import StageContext


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
    if cls.needs:
        faults += length_faults(stage, model.config, "quantize")
    if faults:
        raise SchemeError(*faults)
    scheme = parse(stage.scheme)
    method = cls(**dict(stage.options))
    layers = select(model.anatomy, stage.targets, stage.ignore)
    grids: dict[str, Grid] = {n: g for n in model.anatomy.linears if (g := model.grid(n)) is not None}
    records: dict[str, LayerRecord] = {}
    sums = [0.0, 0.0]

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        done = method.quantize(weight_OI, scheme, stats)
        grids[layer] = done.grid
        sums[0] += float((done.weight_OI.float() - weight_OI.float()).square().sum())
        sums[1] += float(weight_OI.float().square().sum())
        records[layer] = LayerRecord(
            name=layer,
            zero_fraction=float((done.weight_OI == 0).float().mean()),
            bits=done.grid.bits_per_weight(weight_OI.shape[1]),
        )
        new_OI: Tensor = done.weight_OI
        return new_OI

    rows, spill = None, None
    warnings: list[str] = []
    if method.needs:
        rows, spill, said = calibration_rows(
            stage, model, context.data, cache=context.cache, scratch=context.scratch
        )
        warnings += said
    elif stage.data is not None:
        warnings.append(f"{stage.method} reads no data; the data given to it was left unread.")
    with StreamedModel(model, context.out, device=context.device, dtype=context.dtype) as streamed:
        walked = walk(
            streamed, cast(Any, rows), visit, method.needs, layers=layers, title="quantising", spill=spill
        )
        # Before the model is closed, which would carry the source's grids over.
        write_grids(context.out, grids)
    return StageResult(
        promises=tuple(OnGrid(layer=layer, scheme=stage.scheme) for layer in layers),
        layers=tuple(replace(records[n], relative_error=walked.relative_error[n]) for n in layers),
        metrics={
            "weight_relative_error": sums[0] / sums[1] if sums[1] else 0.0,
            "calibration_tokens": walked.num_tokens,
        },
        warnings=tuple(warnings),
    )
