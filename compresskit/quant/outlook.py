"""What can be told of a quantisation before it runs: bits per weight, and the memory it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, cast

from compresskit.calibration.oneshot import (
    calibration_bytes,
    gram_bytes,
    largest_layer,
    probe_bytes,
    spilled_bytes,
    walk_bytes,
)
from compresskit.quant import QUANTIZERS
from compresskit.quant.known import known
from compresskit.stage import Forecast, Outlook

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.quant.scheme import Scheme
    from compresskit.quant.stage import Quantize

MEASURED = (
    "Each layer's scheme is chosen when the stage runs, with the whole model in memory; sizes here assume "
    "that target_bits is just reached."
)


def forecast_rounding(stage: Quantize, model: Outlook) -> Forecast:
    """The layers' bits go down; memory is what lies outside the blocks, one block, one layer's integers
    and, for a method that reads any, the calibration rows.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
    """
    anatomy = model.anatomy
    possible = stage.possible(anatomy)
    schemes = {layer: fits[0] for layer, fits in possible.items()}
    scale_bits = known(model).scale_bits
    bits = {n: s.bits_per_weight(anatomy.linears[n].in_features, scale_bits) for n, s in schemes.items()}
    notes = rounded_inputs(schemes.values())
    # Spread scales and quotient in float32, and the integers, of one layer.
    layer_bytes = largest_layer(anatomy, list(schemes)) * (4 + 4 + 1 + 4)
    if "input_gram" in QUANTIZERS[stage.method].needs:
        layer_bytes += gram_bytes(anatomy, list(schemes))
    if hasattr(QUANTIZERS[stage.method], "scale"):
        # A float32 copy of a block to find out who may scale whom, or a layer scaled, rounded and compared.
        layer_bytes += 4 * max(_largest_block(anatomy), 3 * largest_layer(anatomy, list(schemes)))
    memory, spilled = walk_bytes(anatomy, model.weight_bytes) + layer_bytes, 0
    if stage.reads_data:
        memory += calibration_bytes(stage, model.config, anatomy)
        spilled = spilled_bytes(stage, model.config, anatomy)
    if stage.is_auto:
        bits = dict.fromkeys(schemes, cast(float, stage.target_bits))
        memory = max(memory, probe_bytes(anatomy, model.weight_bytes))
        notes = (*notes, MEASURED)
    return Forecast(
        after=replace(
            model,
            layer_bits={**model.layer_bits, **bits},
            layer_schemes={**model.layer_schemes, **{n: tuple(map(str, of)) for n, of in possible.items()}},
        ),
        layers=len(schemes),
        memory_bytes=round(memory),
        scratch_bytes=spilled,
        notes=notes,
    )


def rounded_inputs(schemes: Iterable[Scheme]) -> tuple[str, ...]:
    """A sentence for each way in which layers of these ``schemes`` round their inputs."""
    ways: dict[str, None] = {}
    for scheme in schemes:
        if scheme.static:
            ways["8 bits, on one scale for each layer that calibration fixes,"] = None
        elif scheme.activation_bits:
            ways["e4m3 per token" if scheme.number == "float" else "8 bits per token"] = None
    return tuple(
        f"Inputs of layers are rounded to {way} while the model runs, besides their weights." for way in ways
    )


def _largest_block(anatomy: Anatomy) -> int:
    """Parameters of the largest block."""
    sizes = dict.fromkeys(anatomy.blocks, 0)
    for name, shape in anatomy.parameter_shapes.items():
        if block := anatomy.block_of(name):
            sizes[block] += prod(shape)
    return max(sizes.values(), default=0)
