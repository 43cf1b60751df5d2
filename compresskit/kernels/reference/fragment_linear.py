"""The product with a weight in the layout ``fragment``. Shapes: ``packed/fragment.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.dense_linear import wide_linear
from compresskit.kernels.reference.fragment_expand import fragment_expand
from compresskit.kernels.reference.projection import accumulator


def fragment_linear(
    inputs: Tensor, values_ST64x8: Tensor, places_ST32: Tensor, rows_O0: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): the weight made dense, in fp32 at least, and multiplied."""
    wide = accumulator(inputs.dtype)
    weight_OI = fragment_expand(values_ST64x8, places_ST32, rows_O0, inputs.shape[-1], wide)
    return wide_linear(inputs, weight_OI, bias_O)
