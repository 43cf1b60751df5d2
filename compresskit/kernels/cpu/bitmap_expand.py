"""The dense weight of the layout ``bitmap``, in C. Shapes: ``packed/bitmap.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.cpu.library import Rows, expand


def bitmap_expand(
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (O, I) in ``dtype``, as ``reference.bitmap_expand``."""
    out_OI = torch.empty(words_OW.shape[0], in_features, dtype=dtype, device="cpu")
    weight = Rows(words_OW=words_OW, values=values_S, starts=starts, scales_OG=scales_OG).with_slack()
    expand("bitmap_expand", weight, out_OI)
    return out_OI
