"""The product with a weight in the layout ``two_four``. Shapes: ``packed/two_four.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.dense_linear import wide_linear
from compresskit.kernels.reference.projection import accumulator
from compresskit.kernels.reference.two_four_expand import two_four_expand


def two_four_linear(
    inputs: Tensor, values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): the weight made dense, in fp32 at least, and multiplied."""
    weight_OI = two_four_expand(values_S, places_OW, scales_OG, inputs.shape[-1], accumulator(inputs.dtype))
    return wide_linear(inputs, weight_OI, bias_O)
