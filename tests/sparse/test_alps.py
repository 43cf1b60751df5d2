"""ALPS: what it ends with is a solution on its support, and a better one than a sweep's."""

from __future__ import annotations

import pytest
import torch

from compresskit.errors import PatternError, StatisticError
from compresskit.sparse.alps import Alps
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured
from compresskit.sparse.sparsegpt import SparseGPT
from compresskit.sparse.wanda import Wanda
from tests.sparse.test_sparsegpt import inputs, stats_of

PATTERNS = [NM(2, 4), RowUnstructured(0.7), LayerUnstructured(0.6), Block(0.5, 4, 6), NM(4, 11, pad=True)]


def change(weight: torch.Tensor, new: torch.Tensor, x: torch.Tensor) -> float:
    return float(((new - weight) @ x.t()).square().sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_output_changes_less_than_after_a_sweep(pattern: Pattern) -> None:
    x = inputs()
    stats, weight = stats_of(x), torch.randn(12, 48)
    errors = [
        change(weight, method.prune(weight, stats).weight_OI, x)
        for method in (Alps(pattern=pattern), SparseGPT(pattern=pattern), Wanda(pattern=pattern))
    ]
    assert errors[0] < 0.95 * min(errors[1:])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_solves_on_its_support(pattern: Pattern) -> None:
    x = inputs()
    weight = torch.randn(12, 48)
    got = Alps(pattern=pattern, refinements=200, damping=0).prune(weight, stats_of(x))
    for row, keep, new in zip(weight, got.keep_OI, got.weight_OI, strict=True):
        part = x[:, keep].double()
        exact = torch.linalg.lstsq(part, (x @ row).double()[:, None]).solution[:, 0]
        torch.testing.assert_close(new[keep].double(), exact, rtol=1e-3, atol=1e-3)


def test_the_support_is_better_than_that_it_begins_with() -> None:
    """A single iteration with a solution on its support, against all of them."""
    x = inputs()
    stats, weight = stats_of(x), torch.randn(12, 48)
    few, all_of_them = (
        change(
            weight, Alps(pattern=NM(2, 4), iterations=n, refinements=100).prune(weight, stats).weight_OI, x
        )
        for n in (1, 300)
    )
    assert all_of_them < few


def test_zeros_stay_and_count() -> None:
    x = inputs()
    weight = torch.randn(12, 48).where(torch.rand(12, 48) > 0.4, 0)
    got = Alps(pattern=NM(2, 4)).prune(weight, stats_of(x))
    assert not got.weight_OI[weight == 0].any()
    assert NM(2, 4).missing(got.weight_OI == 0) == ()
    alive, kept = (mask.reshape(12, -1, 4).sum(-1) for mask in (weight != 0, got.keep_OI))
    assert torch.equal(kept, alive.clamp(max=2)), "zeros that are there are counted first"


def test_inputs_that_were_always_zero_do_no_harm() -> None:
    x = inputs()
    x[:, 5] = 0
    got = Alps(pattern=NM(2, 4), damping=0).prune(torch.randn(12, 48), stats_of(x))
    assert got.weight_OI.isfinite().all()


def test_faults_are_told() -> None:
    with pytest.raises(PatternError, match=r"divisible by 4"):
        Alps(pattern=NM(2, 4)).prune(torch.randn(4, 6), stats_of(torch.randn(9, 6)))
    with pytest.raises(StatisticError, match=r"fc.*zero for every token"):
        Alps(pattern=NM(2, 4)).prune(torch.randn(4, 8), stats_of(torch.zeros(9, 8)))
