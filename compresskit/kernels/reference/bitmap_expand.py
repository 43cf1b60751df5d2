"""The dense weight of the layout ``bitmap``. Shapes: ``packed/bitmap.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.bitmap import unpack_bits
from compresskit.kernels.reference.dense_linear import scaled
from compresskit.kernels.reference.projection import accumulator


def bitmap_expand(
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (O, I) in ``dtype``; products with scales are rounded once."""
    keep_OI = unpack_bits(words_OW.view(torch.uint8), in_features)
    dense_OI = torch.zeros(keep_OI.shape, dtype=values_S.dtype, device=keep_OI.device)
    dense_OI[keep_OI] = values_S[: int(starts[-1])]
    if scales_OG.shape[1]:
        dense_OI = scaled(dense_OI.to(accumulator(dtype)), scales_OG)
    return dense_OI.to(dtype)
