"""The product with a weight in the layout ``gap``. Shapes: ``packed/gap.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.dense_linear import wide_linear
from compresskit.kernels.reference.gap_expand import gap_expand
from compresskit.kernels.reference.projection import accumulator


def gap_linear(
    inputs: Tensor,
    values_G8: Tensor,
    gaps_G: Tensor,
    starts: Tensor,
    width_I0: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): the weight made dense, in fp32 at least, and multiplied."""
    wide = accumulator(inputs.dtype)
    weight_OI = gap_expand(values_G8, gaps_G, starts, width_I0, inputs.shape[-1], wide)
    return wide_linear(inputs, weight_OI, bias_O)
