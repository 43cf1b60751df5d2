"""What a stage that quantises asks of a model, be it a checkpoint or only foreseen. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.quant.scheme import Scheme, parse, scheme_of
from compresskit.stage import Outlook

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.modeling.source import ModelSource


FLOAT_BITS = (16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The same answers for both kinds of model.

    Attributes:
        anatomy: its linear layers and their shapes.
        quantised: of each layer that is quantised already the scheme it has, or all of those it may have.
        scale_bits: of one scale of a grid, which has the dtype of the weights: 16, 32 or 64.
        device: ``cpu`` or ``cuda``, where the stage runs.
    """

    anatomy: Anatomy
    quantised: Mapping[str, tuple[Scheme, ...]]
    scale_bits: int
    device: str


def known(model: Outlook | ModelSource) -> Known:
    """What is known of ``model``; reads no weight."""
    if isinstance(model, Outlook):
        names = {layer: model.layer_schemes.get(layer, ()) for layer in model.layer_bits}
        return Known(
            anatomy=model.anatomy,
            quantised={layer: tuple(map(parse, texts)) for layer, texts in names.items()},
            scale_bits=_float_bits(model.weight_bytes),
            device=model.device,
        )
    from compresskit.modeling import resolve_device

    grids = ((layer, model.grid(layer)) for layer in model.anatomy.linears)
    return Known(
        anatomy=model.anatomy,
        quantised={layer: (scheme_of(grid),) for layer, grid in grids if grid is not None},
        scale_bits=_float_bits(model.bytes / max(model.anatomy.num_parameters, 1)),
        device=resolve_device("auto").type,
    )


def _float_bits(weight_bytes: float) -> int:
    """Of the dtype whose size is nearest: a mean may count tensors of another dtype, or stored twice."""
    return min(FLOAT_BITS, key=lambda bits: abs(bits - 8 * weight_bytes))
