"""The dense weight of the layout ``tile``. Shapes: ``packed/tile.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.packed.tile import scattered


def tile_expand(
    packets_H: Tensor, starts_ST: Tensor, extents_OZ0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``."""
    return scattered(packets_H, starts_ST, extents_OZ0)[1][:, :in_features].to(dtype).contiguous()
