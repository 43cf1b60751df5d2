"""GPTQ against the slow loop of its paper; what is zero, what is damped, what cannot be."""

from __future__ import annotations

import pytest
import torch

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import StatisticError
from compresskit.quant.affine import grid_for
from compresskit.quant.gptq import GPTQ
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import parse


def inputs(tokens: int = 200, features: int = 64) -> torch.Tensor:
    torch.manual_seed(5)
    mix = torch.randn(features, features) / 4
    return torch.randn(tokens, features) @ mix * torch.rand(features).exp()


def stats_of(x: torch.Tensor) -> LayerStats:
    return LayerStats(num_tokens=len(x), input_gram_II=x.t() @ x / len(x), layer="fc")


def slow(weight: torch.Tensor, scheme: str, x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order: after each input the inverse Hessian loses its row."""
    grid = grid_for(weight, parse(scheme))
    hessian = (x.t() @ x / len(x)).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    left, keep, new = weight.double().clone(), weight != 0, torch.zeros_like(weight)
    todo = list(order)
    while todo:
        place = todo.pop(0)
        rounded = grid.columns(place, place + 1).snap(left[:, place : place + 1].float())[:, 0]
        new[:, place] = rounded.where(keep[:, place], 0)
        inverse = torch.linalg.inv(hessian[[place, *todo]][:, [place, *todo]])
        error = (left[:, place] - new[:, place].double()) / inverse[0, 0]
        left[:, todo] -= error[:, None] * inverse[0, 1:]
    return new


@pytest.mark.parametrize("leaf", [7, 64])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-channel", "w8a8", "w4a16-g32-asym"])
def test_it_is_the_slow_loop(scheme: str, ordered: bool, leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.calibration.sweep.LEAF", leaf)
    x = inputs()
    weight = torch.randn(16, 64).where(torch.rand(16, 64) > 0.3, 0)
    order = x.square().mean(0).argsort(descending=True).tolist() if ordered else list(range(64))
    method = GPTQ(activation_order=ordered, search_range=False)
    got = method.quantize(weight, parse(scheme), stats_of(x)).weight_OI
    want = slow(weight, scheme, x, order)
    assert (got == want).float().mean() > 0.995, "all but what float32 rounds otherwise"
    assert not got[weight == 0].any()


@pytest.mark.parametrize("search_range", [False, True])
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_it_changes_the_output_less_than_rounding(zeros: float, search_range: bool) -> None:
    x = inputs()
    weight = torch.randn(32, 64).where(torch.rand(32, 64) > zeros, 0)

    def change(new: torch.Tensor) -> float:
        return float(((new - weight) @ x.t()).square().sum())

    scheme = parse("w4a16-g32")
    got = GPTQ(search_range=search_range).quantize(weight, scheme, stats_of(x)).weight_OI
    assert change(got) < 0.8 * change(RoundToNearest().quantize(weight, scheme).weight_OI)


def test_an_input_that_was_always_zero_is_rounded_to_nearest() -> None:
    x = inputs()
    x[:, 5] = 0
    weight = torch.randn(8, 64)
    got = GPTQ(search_range=False).quantize(weight, parse("w4a16-g32"), stats_of(x)).weight_OI
    near = grid_for(weight, parse("w4a16-g32")).snap(weight)
    assert torch.equal(got[:, 5], near[:, 5])


def test_damping_is_raised_step_by_step_and_said() -> None:
    gram = -torch.eye(64) * 0.05
    gram.diagonal()[:32] = 1  # not positive: its mean is 1, so 0.1 makes every eigenvalue so
    got = GPTQ().quantize(torch.randn(4, 64), parse("w8a16"), LayerStats(num_tokens=9, input_gram_II=gram))
    assert got.note == "damping raised from 0.01 to 0.1"
    easy = GPTQ().quantize(torch.randn(4, 64), parse("w8a16"), stats_of(inputs()))
    assert easy.note == ""


def test_a_hessian_without_a_factor_is_an_error_not_an_identity() -> None:
    gram = 2 * torch.eye(64) - 1
    with pytest.raises(StatisticError, match="fc: expected a Hessian with a Cholesky factor, got none with"):
        GPTQ().quantize(torch.randn(4, 64), parse("w8a16"), LayerStats(9, input_gram_II=gram, layer="fc"))
    with pytest.raises(StatisticError, match="fc: expected inputs to measure, got zero for every token"):
        GPTQ().quantize(torch.randn(4, 64), parse("w8a16"), stats_of(torch.zeros(9, 64)))


def test_it_needs_a_gram_matrix() -> None:
    with pytest.raises(StatisticError, match="input_gram: expected statistics of the layer's inputs"):
        GPTQ().quantize(torch.randn(4, 64), parse("w8a16"), LayerStats(num_tokens=0))
