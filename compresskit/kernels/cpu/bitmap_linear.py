"""The product with a weight in the layout ``bitmap``, in C. Shapes: ``packed/bitmap.py``."""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.cpu.library import Rows
from compresskit.kernels.cpu.prefill import linear_or_expand


def bitmap_linear(
    inputs: Tensor,
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O), as ``reference.bitmap_linear``; sums are taken in fp32."""
    weight = Rows(words_OW=words_OW, values=values_S, starts=starts, scales_OG=scales_OG).with_slack()
    return linear_or_expand("bitmap_linear", inputs, weight, bias_O)
