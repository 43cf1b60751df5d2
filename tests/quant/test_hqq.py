"""HQQ: never worse than rounding by its own measure, and against the best of every scale."""

from __future__ import annotations

import pytest
import torch

from compresskit.quant.affine import grid_for
from compresskit.quant.hqq import HalfQuadratic
from compresskit.quant.scheme import parse


def cost(new: torch.Tensor, weight: torch.Tensor, norm: float = 0.7) -> torch.Tensor:
    return (new - weight).abs().pow(norm).reshape(len(weight), -1, 32).sum(-1)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym"])
def test_no_group_is_worse_than_rounded_to_nearest_and_outliers_pay(scheme: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    weight[:, ::32] *= 4  # an outlier in every group
    before = weight.clone()
    form = parse(scheme)
    near, got = grid_for(weight, form).snap(weight), HalfQuadratic(norm=0.7).quantize(weight, form).weight_OI
    assert torch.equal(weight, before)
    assert bool((cost(got, weight) <= cost(near, weight) + 1e-6).all())
    assert cost(got, weight).sum() < 0.93 * cost(near, weight).sum()


def test_it_comes_near_the_best_of_every_scale() -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(16, 32), parse("w4a16-g32")
    scales = torch.linspace(0.3, 1.2, 400)
    best = torch.stack([cost(grid_for(weight, form, float(s)).snap(weight), weight) for s in scales]).amin(0)
    near = cost(grid_for(weight, form).snap(weight), weight)
    got = cost(HalfQuadratic(norm=0.7).quantize(weight, form).weight_OI, weight)
    assert (near - got).sum() > 0.5 * (near - best).sum()


def test_no_iterations_are_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(4, 64), parse("w4a16-g32-asym")
    got = HalfQuadratic(iterations=0).quantize(weight, form).weight_OI
    assert torch.equal(got, grid_for(weight, form).snap(weight))
