"""SET: the smallest weights are dropped now and then, and as many grow at random places.

Paper: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 2018, https://arxiv.org/abs/1707.04780. Here the share
that is replaced falls on a cosine.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresskit.sparse.base import Moment
from compresskit.sparse.rewire import Rewiring


@dataclass(frozen=True, slots=True, kw_only=True)
class SET(Rewiring):
    """Growing at random, the same places on every rank and after every restart."""

    needs_gradient: ClassVar[bool] = False

    def growth(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """Random numbers from the moment's seed."""
        generator = torch.Generator().manual_seed(moment.seed)
        return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
