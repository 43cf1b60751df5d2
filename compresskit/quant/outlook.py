"""What can be told of a quantisation before it runs: bits per weight, and the memory it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.calibration.oneshot import calibration_bytes, largest_layer, walk_bytes
from compresskit.quant import QUANTIZERS
from compresskit.quant.scheme import parse
from compresskit.stage import Forecast, Outlook
from compresskit.targets import select

if TYPE_CHECKING:
    from compresskit.quant.stage import Quantize

ROUNDED_INPUTS = (
    "Each layer's input is rounded to 8 bits per token while the model runs, besides its weights."
)


def forecast_rounding(stage: Quantize, model: Outlook) -> Forecast:
    """The layers' bits go down; memory is what lies outside the blocks, one block, one layer's integers
    and, for a method that reads any, the calibration rows.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
    """
    anatomy, scheme = model.anatomy, parse(stage.scheme)
    layers = select(anatomy, stage.targets, stage.ignore)
    scale_bits = round(8 * model.weight_bytes)
    bits = {n: scheme.bits_per_weight(anatomy.linears[n].in_features, scale_bits) for n in layers}
    # Spread scales and quotient in float32, and the integers, of one layer.
    memory = walk_bytes(anatomy, model.weight_bytes) + largest_layer(anatomy, layers) * (4 + 4 + 1 + 4)
    if QUANTIZERS[stage.method].needs:
        memory += calibration_bytes(stage, model.config, anatomy)
    return Forecast(
        after=replace(model, layer_bits={**model.layer_bits, **bits}),
        layers=len(layers),
        memory_bytes=round(memory),
        notes=(ROUNDED_INPUTS,) if scheme.activation_bits else (),
    )
