"""Grids that cover a range: how far a weight within it may be from its nearest value."""

from __future__ import annotations

import pytest
import torch

from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.31, 5.0])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w4a16-channel-asym"])
def test_no_weight_is_further_than_half_a_step(scheme: str, shift: float) -> None:
    """Also the least and the largest, which a zero point on the wrong side would cut."""
    torch.manual_seed(0)
    weight_OI = torch.randn(64, 64) + shift
    grid = grid_for(weight_OI, parse(scheme))
    error_OGM = (grid.snap(weight_OI) - weight_OI).abs().reshape(*grid.scale_OG.shape, -1)
    assert ((error_OGM / grid.scale_OG[..., None]).amax() - 0.5).abs() < 0.02
