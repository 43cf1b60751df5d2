"""SparseGPT against the slow loop of its paper; what is zero, what is damped, what cannot be."""

from __future__ import annotations

import pytest
import torch

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import PatternError, StatisticError
from compresskit.sparse.magnitude import Magnitude
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured
from compresskit.sparse.sparsegpt import SparseGPT
from compresskit.sparse.wanda import Wanda


def inputs(tokens: int = 300, features: int = 48) -> torch.Tensor:
    torch.manual_seed(3)
    mix = torch.eye(features) + torch.randn(features, features) / 10
    return torch.randn(tokens, features) @ mix * torch.rand(features).exp()


def stats_of(x: torch.Tensor) -> LayerStats:
    gram = x.t() @ x / len(x)
    return LayerStats(num_tokens=len(x), input_sq_mean_I=gram.diagonal(), input_gram_II=gram, layer="fc")


def slow(weight: torch.Tensor, pattern: Pattern, x: torch.Tensor, unit: int) -> torch.Tensor:
    """Optimal brain surgery in a fixed order: after each input the inverse Hessian loses its row."""
    hessian = (x.t() @ x / len(x)).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverses = [torch.linalg.inv(hessian[at:, at:]) for at in range(len(hessian))]
    left, new = weight.double().clone(), torch.zeros_like(weight)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for at, inverse in enumerate(inverses):
        if at % unit == 0:
            loss = torch.tensor([float(inverses[i][0, 0]) for i in range(at, min(at + unit, len(inverses)))])
            score = (left[:, at : at + unit] ** 2 / loss).sqrt()
            score[weight[:, at : at + unit] == 0] = -1
            keep[:, at : at + unit] = pattern.keep_part(score.float(), at)
        new[:, at] = left[:, at].to(weight.dtype).where(keep[:, at] & (weight[:, at] != 0), 0)
        error = (left[:, at] - new[:, at].double()) / inverse[0, 0]
        left[:, at + 1 :] -= error[:, None] * inverse[0, 1:]
    return new


@pytest.mark.parametrize("zeros", [0.0, 0.3])
@pytest.mark.parametrize("leaf", [8, 64])
@pytest.mark.parametrize(
    "pattern",
    [
        NM(2, 4),
        NM(1, 3),
        NM(8, 16),
        NM(4, 11, pad=True),
        RowUnstructured(0.6),
        LayerUnstructured(0.45),
        Block(0.5, 4, 8),
        Block(0.4, 1, 6),
        Block(0.5, 5, 9, pad=True),
        Block(0.5, 2, 24),
    ],
    ids=str,
)
def test_it_is_the_slow_loop(
    pattern: Pattern, leaf: int, zeros: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compresskit.calibration.sweep.LEAF", leaf)
    x = inputs()
    weight = torch.randn(12, 48)
    weight = weight.where(torch.rand(12, 48) >= zeros, 0)
    competes = not isinstance(pattern, NM)  # of as many units as go into 20 inputs, or of one
    got = SparseGPT(pattern=pattern, block=20).prune(weight, stats_of(x))
    unit = {8: 16, 6: 18, 9: 18, 1: 20}.get(pattern.unit, pattern.unit) if competes else pattern.unit
    want = slow(weight, pattern, x, unit)
    assert torch.equal(got.weight_OI == 0, want == 0)
    torch.testing.assert_close(got.weight_OI, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(got.keep_OI, want != 0)
    assert pattern.missing(got.weight_OI == 0) == ()
    assert not got.weight_OI[weight == 0].any()


def test_what_rounding_to_a_narrow_dtype_costs_is_spread_too() -> None:
    x = inputs()
    weight = torch.randn(64, 48).bfloat16()
    got = SparseGPT(pattern=NM(2, 4)).prune(weight, stats_of(x)).weight_OI
    want = slow(weight, NM(2, 4), x, 4)
    assert (got == want).float().mean() > 0.995, "all but what float32 rounds otherwise"


@pytest.mark.parametrize("pattern", [NM(2, 4), RowUnstructured(0.5)], ids=str)
def test_the_output_changes_less_than_by_zeroing_alone(pattern: Pattern) -> None:
    x, stats = inputs(), stats_of(inputs())
    weight = torch.randn(12, 48)
    errors = [
        float(((method.prune(weight, stats).weight_OI - weight) @ x.t()).square().sum())
        for method in (SparseGPT(pattern=pattern), Wanda(pattern=pattern), Magnitude(pattern=pattern))
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1]


def test_damping_is_raised_step_by_step_and_said() -> None:
    x = torch.ones(5, 8)  # one direction alone
    got = SparseGPT(pattern=NM(2, 4), damping=0).prune(torch.randn(4, 8), stats_of(x))
    assert got.note == "damping raised from 0 to 0.0001"
    assert SparseGPT(pattern=NM(2, 4)).prune(torch.randn(4, 8), stats_of(x)).note == ""


def test_an_input_that_was_always_zero_asks_for_no_damping() -> None:
    x = inputs()
    x[:, 5] = 0
    got = SparseGPT(pattern=NM(2, 4), damping=0).prune(torch.randn(12, 48), stats_of(x))
    assert got.note == ""
    assert got.weight_OI.isfinite().all()


def test_faults_are_told() -> None:
    with pytest.raises(PatternError, match=r"divisible by 4.*\(4, 6\)"):
        SparseGPT(pattern=NM(2, 4)).prune(torch.randn(4, 6), stats_of(torch.randn(9, 6)))
    with pytest.raises(StatisticError, match=r"fc.*zero for every token"):
        SparseGPT(pattern=NM(2, 4)).prune(torch.randn(4, 8), stats_of(torch.zeros(9, 8)))
    with pytest.raises(StatisticError, match=r"input_gram.*not collected"):
        SparseGPT(pattern=NM(2, 4)).prune(torch.randn(4, 8), LayerStats(num_tokens=9, layer="fc"))
