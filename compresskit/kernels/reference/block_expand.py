"""The dense weight of the layout ``block``. Shapes: ``packed/block.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.packed.block import scattered


def block_expand(
    values_B16x16: Tensor,
    columns_B: Tensor,
    starts: Tensor,
    extents_OC0: Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (O, I) in ``dtype``; zeros are 0.0."""
    return scattered(values_B16x16, columns_B, starts, extents_OC0)[:, :in_features].to(dtype) + 0.0
