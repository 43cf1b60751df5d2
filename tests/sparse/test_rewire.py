"""Densities, dropping and growing, each beside the same thing done one weight at a time."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compresskit.sparse.base import Moment
from compresskit.sparse.erk import erk_zero_fractions
from compresskit.sparse.pattern import NM, LayerUnstructured, RowUnstructured
from compresskit.sparse.rewire import GROWN
from compresskit.sparse.rigl import RigL
from compresskit.sparse.set import SET

STEPS = 40
METHODS = [SET, RigL]
side = st.integers(2, 400)


@given(
    shapes=st.lists(st.tuples(side, side), min_size=1, max_size=6),
    zero_fraction=st.floats(0.05, 0.95),
)
def test_densities_are_those_of_the_paper(shapes: list[tuple[int, int]], zero_fraction: float) -> None:
    """All weights together have the zeros asked for; below 1, a density is epsilon (O + I) / (O I)."""
    named = {str(i): shape for i, shape in enumerate(shapes)}
    found = erk_zero_fractions(named, zero_fraction)
    sizes = {n: o * i for n, (o, i) in named.items()}
    total = sum(found[n] * sizes[n] for n in named)
    assert total == pytest.approx(zero_fraction * sum(sizes.values()), rel=1e-9)
    epsilons = [(1 - found[n]) * sizes[n] / sum(named[n]) for n in named if found[n] > 0]
    assert epsilons == pytest.approx([epsilons[0]] * len(epsilons), rel=1e-9)
    for name in named.keys() - {n for n in named if found[n] > 0}:
        assert found[name] == 0
        assert epsilons[0] * sum(named[name]) / sizes[name] >= 1 - 1e-9, "it need not be dense"
    assert all(0 <= fraction < 1 for fraction in found.values())


def test_layers_of_one_shape_get_the_share_itself() -> None:
    assert erk_zero_fractions({"a": (8, 4), "b": (8, 4)}, 0.7) == pytest.approx({"a": 0.7, "b": 0.7})


def test_a_square_is_sparser_than_a_strip_and_a_small_layer_stays_dense() -> None:
    method = SET(pattern=LayerUnstructured(0.8))
    found = method.patterns({"square": (64, 64), "strip": (512, 8), "small": (4, 4)})
    assert found.keys() == {"square", "strip"}
    assert found["square"].zero_fraction > 0.8 > found["strip"].zero_fraction


def slow_update(method: Any, weight_OI: Tensor, growth_OI: Tensor, step: int) -> Tensor:
    """Weight by weight, in plain Python."""
    weights, growth = weight_OI.flatten().tolist(), growth_OI.flatten().tolist()
    alive = [i for i, w in enumerate(weights) if w]
    share = method.drop_fraction / 2 * (1 + cos(pi * step / method.last(STEPS)))
    dropped = sorted(alive, key=lambda i: abs(weights[i]))[: round(share * len(alive))]
    kept = [i for i in alive if i not in dropped]
    candidates = sorted((i for i in range(len(weights)) if i not in kept), key=lambda i: -growth[i])
    grown = candidates[: len(alive) - len(kept)]
    made = [w if i in kept or (i in grown and i in alive) else 0.0 for i, w in enumerate(weights)]
    for i in grown:
        made[i] = made[i] or GROWN
    return torch.tensor(made).view(weight_OI.shape)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("step", [10, 20, 30])
def test_drops_the_smallest_and_grows_by_score(cls: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    method = cls(pattern=LayerUnstructured(0.7), drop_fraction=0.5)
    dense_OI, gradient_OI = (torch.randn(10, 12, generator=generator) for _ in range(2))
    weight_OI = method.update(dense_OI, Moment(0, STEPS))
    assert torch.equal(weight_OI != 0, LayerUnstructured(0.7).keep_largest(dense_OI.abs()))
    before, moment = weight_OI.clone(), Moment(step, STEPS, seed=7, gradient_OI=gradient_OI)
    random = torch.rand(10, 12, generator=torch.Generator().manual_seed(7))
    growth_OI = gradient_OI.abs() if cls is RigL else random
    made_OI = method.update(weight_OI, moment)
    assert torch.equal(made_OI, slow_update(method, weight_OI, growth_OI, step))
    assert int((made_OI == 0).sum()) == 84
    assert bool((made_OI == GROWN).any()) == (step < 30), "the cosine ends at the last change"
    assert torch.equal(weight_OI, before), "the argument was modified"
    again = method.update(weight_OI, Moment(step, STEPS, seed=8, gradient_OI=gradient_OI))
    assert torch.equal(again, made_OI) == (cls is RigL or step == 30), "the seed decides where SET grows"


@pytest.mark.parametrize("cls", METHODS)
def test_weights_that_training_left_at_zero_are_made_up_for(cls: Any) -> None:
    method = cls(pattern=LayerUnstructured(0.5))
    weight_OI = torch.zeros(4, 8)
    weight_OI[0, :3] = 1.0
    moment = Moment(10, STEPS, gradient_OI=torch.ones(4, 8))
    assert int((method.update(weight_OI, moment) == 0).sum()) == 16


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("pattern", [NM(2, 4), RowUnstructured(0.5)], ids=str)
def test_other_patterns_are_refused(cls: Any, pattern: Any) -> None:
    assert "80%:layer" in cls.unfit(pattern)
    assert cls.unfit(LayerUnstructured(0.5)) == ""


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("step", [10, 30])
def test_without_a_gradient_to_go_by_zeros_stay(spoilt: float, step: int) -> None:
    """One number that is not finite tells nothing of the others; nor do zeros alone."""
    method, gradient_OI = RigL(pattern=LayerUnstructured(0.5)), torch.zeros(4, 8)
    weight_OI = method.update(torch.randn(4, 8), Moment(0, STEPS))
    gradient_OI[1, 2] = spoilt
    made_OI = method.update(weight_OI, Moment(step, STEPS, gradient_OI=gradient_OI))
    assert torch.equal(made_OI, weight_OI)
