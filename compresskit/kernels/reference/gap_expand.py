"""The dense weight of the layout ``gap``. Shapes: ``packed/gap.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.packed.gap import scattered


def gap_expand(
    values_G8: Tensor, gaps_G: Tensor, starts: Tensor, width_I0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``; zeros are 0.0."""
    return scattered(values_G8, gaps_G, starts, width_I0).to(dtype) + 0.0
