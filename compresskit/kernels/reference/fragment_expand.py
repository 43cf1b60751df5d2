"""The dense weight of the layout ``fragment``. Shapes: ``packed/fragment.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.packed.fragment import scattered


def fragment_expand(
    values_ST64x8: Tensor, places_ST32: Tensor, rows_O0: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (O, I) in ``dtype``; zeros are 0.0."""
    return scattered(values_ST64x8, places_ST32, rows_O0)[:, :in_features].to(dtype) + 0.0
