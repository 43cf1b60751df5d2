"""The product with a weight in the layout ``two_four``, in C. Shapes: ``packed/two_four.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.cpu.library import Rows
from compresskit.kernels.cpu.prefill import linear_or_expand


def two_four_linear(
    inputs: Tensor, values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O), as ``reference.two_four_linear``; sums are taken in fp32."""
    weight = Rows(words_OW=places_OW, values=values_S, starts=None, scales_OG=scales_OG)
    return linear_or_expand("two_four_linear", inputs, weight, bias_O)
