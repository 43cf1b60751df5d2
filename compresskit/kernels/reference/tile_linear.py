"""The product with a weight in the layout ``tile``. Shapes: ``packed/tile.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.dense_linear import wide_linear
from compresskit.kernels.reference.projection import accumulator
from compresskit.kernels.reference.tile_expand import tile_expand


def tile_linear(
    inputs: Tensor, packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): the weight made dense, in fp32 at least, and multiplied."""
    wide = accumulator(inputs.dtype)
    weight_OI = tile_expand(packets_H, starts_ST, extents_OZ0, inputs.shape[-1], wide)
    return wide_linear(inputs, weight_OI, bias_O)
