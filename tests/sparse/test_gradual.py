"""The schedule of the paper written out, and zeros picked one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compresskit.sparse.base import Moment
from compresskit.sparse.gradual import Gradual
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured

STEPS = 40


def slow_zeros(weight_OI: Tensor, count: int) -> Tensor:
    """The ``count`` smallest of the layer, found one after another."""
    left = weight_OI.abs().flatten().tolist()
    zero = torch.zeros(len(left), dtype=torch.bool)
    for _ in range(count):
        index = min((i for i in range(len(left)) if not zero[i]), key=left.__getitem__)
        zero[index] = True
    return zero.view(weight_OI.shape)


@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.75), (0.25, 0.5), (0.0, 1.0)])
def test_the_cubic_schedule(begin: float, end: float) -> None:
    method = Gradual(pattern=LayerUnstructured(0.8), begin=begin, end=end)
    for step in range(STEPS + 1):
        first, last = begin * STEPS, end * STEPS
        if step <= first:
            expected = 0.0
        elif step >= last:
            expected = 0.8
        else:
            expected = 0.8 - 0.8 * (1 - (step - first) / (last - first)) ** 3
        assert 0.8 * method.share(step, STEPS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("end", [0.01, 0.5, 1.0])
def test_the_last_change_is_always_due(steps: int, end: float) -> None:
    method = Gradual(pattern=NM(2, 4), update_every=3, end=end)
    due = [step for step in range(steps + 1) if method.due(step, steps)]
    assert due[-1] == max(1, round(end * steps)) == method.last(steps)
    assert due[:-1] == [step for step in range(0, due[-1], 3)]
    assert method.share(due[-1], steps) == 1


def test_a_layer_loses_its_smallest_weights_step_by_step() -> None:
    method = Gradual(pattern=LayerUnstructured(0.8), update_every=1, end=1.0)
    weight_OI = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    before = weight_OI.clone()
    for step in range(STEPS + 1):
        made_OI = method.update(weight_OI, Moment(step, STEPS))
        count = round(0.8 * (1 - (1 - step / STEPS) ** 3) * 48)
        assert torch.equal(made_OI == 0, slow_zeros(before, count)), step
        assert torch.equal(made_OI[made_OI != 0], before[made_OI != 0])
        assert torch.equal(weight_OI, before), "the argument was modified"
    assert int((method.update(weight_OI, Moment(STEPS, STEPS)) == 0).sum()) == 38


@pytest.mark.parametrize(
    "pattern",
    [NM(2, 4), NM(1, 4), RowUnstructured(0.625), LayerUnstructured(0.6), Block(0.6, 1, 4), Block(0.5, 5, 2)],
    ids=str,
)
def test_what_is_zero_stays_zero_while_the_rest_moves(pattern: Pattern) -> None:
    """Training moves the weights in between; in the end each group has exactly its zeros."""
    method, generator = Gradual(pattern=pattern, update_every=1, end=0.8), torch.Generator().manual_seed(0)
    weight_OI = torch.randn(5, 8, generator=generator)
    for step in range(STEPS + 1):
        made_OI = method.update(weight_OI, Moment(step, STEPS))
        assert not made_OI[weight_OI == 0].any(), step
        weight_OI = made_OI + 0.1 * torch.randn(5, 8, generator=generator) * (made_OI != 0)
    assert pattern.missing(weight_OI == 0) == ()
    assert int((weight_OI == 0).sum()) == round(pattern.zero_fraction * 40)


def test_two_of_four_comes_after_three_of_four() -> None:
    method = Gradual(pattern=NM(2, 4), update_every=1, end=1.0)
    weight_OI = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    counts = [int((method.update(weight_OI, Moment(s, STEPS)) == 0).sum()) for s in range(STEPS + 1)]
    assert sorted(set(counts)) == [0, 6, 12]
    assert counts == sorted(counts)
    assert counts.index(6) == next(s for s in range(STEPS) if 1 - (1 - s / STEPS) ** 3 >= 0.5)


def test_earlier_zeros_are_among_the_later() -> None:
    weight_OI = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight_OI[:, ::2] = 0
    made_OI = Gradual(pattern=RowUnstructured(0.75)).update(weight_OI, Moment(40, STEPS))
    assert not made_OI[:, ::2].any()
    assert ((made_OI == 0).sum(1) == 12).all()
