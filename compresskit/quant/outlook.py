"""What can be told of a quantisation before it runs: bits per weight, and the memory it takes."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from compresskit.quant.scheme import parse
from compresskit.stage import Forecast, Outlook
from compresskit.targets import select

if TYPE_CHECKING:
    from compresskit.quant.stage import Quantize

ROUNDED_INPUTS = (
    "Each layer's input is rounded to 8 bits per token while the model runs, besides its weights."
)


def forecast_rounding(stage: Quantize, model: Outlook) -> Forecast:
    """The layers' bits go down; memory is what lies outside the blocks, one block, and one layer's integers.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
    """
    anatomy, scheme = model.anatomy, parse(stage.scheme)
    layers = select(anatomy, stage.targets, stage.ignore)
    scale_bits = round(8 * model.weight_bytes)
    bits = {n: scheme.bits_per_weight(anatomy.linears[n].in_features, scale_bits) for n in layers}
    sizes: dict[str | None, int] = {}
    for name, shape in anatomy.parameter_shapes.items():
        block = anatomy.block_of(name)
        sizes[block] = sizes.get(block, 0) + prod(shape)
    tied = sum(prod(anatomy.parameter_shapes[n]) for group in anatomy.tied for n in group[1:])
    outside = sizes.pop(None, 0) - tied
    largest = max(
        (anatomy.linears[n].out_features * anatomy.linears[n].in_features for n in layers), default=0
    )
    # Spread scales and quotient in float32, and the integers, of one layer.
    largest_block = max(sizes.values(), default=0)
    memory = (outside + 2 * largest_block) * model.weight_bytes + largest * (4 + 4 + 1 + 4)
    return Forecast(
        after=replace(model, layer_bits={**model.layer_bits, **bits}),
        layers=len(layers),
        memory_bytes=round(memory),
        notes=(ROUNDED_INPUTS,) if scheme.activation_bits else (),
    )
