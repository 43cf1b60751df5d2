"""The product with a weight in the layout ``block``. Shapes: ``packed/block.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.block_expand import block_expand
from compresskit.kernels.reference.dense_linear import wide_linear
from compresskit.kernels.reference.projection import accumulator


def block_linear(
    inputs: Tensor,
    values_B16x16: Tensor,
    columns_B: Tensor,
    starts: Tensor,
    extents_OC0: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): the weight made dense, in fp32 at least, and multiplied."""
    wide = accumulator(inputs.dtype)
    weight_OI = block_expand(values_B16x16, columns_B, starts, extents_OC0, inputs.shape[-1], wide)
    return wide_linear(inputs, weight_OI, bias_O)
