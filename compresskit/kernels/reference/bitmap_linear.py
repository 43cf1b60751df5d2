"""The product with a weight in the layout ``bitmap``. Shapes: ``packed/bitmap.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.bitmap_expand import bitmap_expand
from compresskit.kernels.reference.dense_linear import wide_linear
from compresskit.kernels.reference.projection import accumulator


def bitmap_linear(
    inputs: Tensor,
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): the weight made dense, in fp32 at least, and multiplied."""
    wide = accumulator(inputs.dtype)
    weight_OI = bitmap_expand(words_OW, values_S, starts, scales_OG, inputs.shape[-1], wide)
    return wide_linear(inputs, weight_OI, bias_O)
