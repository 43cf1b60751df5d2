"""The dense weight of the layout ``two_four``. Shapes: ``packed/two_four.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.reference.dense_linear import scaled
from compresskit.kernels.reference.projection import accumulator


def two_four_expand(
    values_S: Tensor, places_OW: Tensor, scales_OG: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``: values summed at their places; scales are multiplied in fp32."""
    bytes_OB = places_OW.view(torch.uint8)
    places_OF = torch.stack((bytes_OB & 15, bytes_OB >> 4), -1).flatten(1).long()
    wide = accumulator(dtype)
    dense_OF4 = torch.zeros(*places_OF.shape, 4, dtype=wide, device=values_S.device)
    values_OF2 = values_S[: 32 * places_OW.numel()].to(wide).view(len(places_OW), -1, 2)
    dense_OF4.scatter_add_(-1, torch.stack((places_OF & 3, places_OF >> 2), -1), values_OF2)
    dense_OI = dense_OF4.flatten(1)[:, :in_features]
    return (scaled(dense_OI, scales_OG) if scales_OG.shape[1] else dense_OI).to(dtype)
