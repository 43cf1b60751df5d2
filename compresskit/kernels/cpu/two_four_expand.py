"""The dense weight of the layout ``two_four``, in C. Shapes: ``packed/two_four.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.cpu.library import Rows, expand


def two_four_expand(
    values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``, as ``reference.two_four_expand``."""
    out_OI = torch.empty(places_OW.shape[0], in_features, dtype=dtype, device="cpu")
    weight = Rows(words_OW=places_OW, values=values_S, starts=None, scales_OG=scales_OG)
    expand("two_four_expand", weight, out_OI)
    return out_OI
