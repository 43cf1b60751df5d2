"""What every trained pruner keeps to, whatever it does: one line in the table puts a method under these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compresskit.sparse import TRAINED_PRUNERS
from compresskit.sparse.base import Moment
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured

STEPS = 20
ENDS: tuple[Pattern, ...] = (LayerUnstructured(0.75), RowUnstructured(0.5), NM(2, 4), Block(0.5, 3, 4))
CASES = [(name, end) for name in TRAINED_PRUNERS for end in ENDS]


def fitting(name: str, end: Pattern) -> Any:
    """The method for such an end; a test of one it refuses is left out."""
    cls: Any = TRAINED_PRUNERS[name]
    if cls.unfit(end):
        pytest.skip(f"{name} makes {cls.unfit(end)}")
    return cls(pattern=end)


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def moment(step: int, weight_OI: Tensor) -> Moment:
    """With all that any method may ask for."""
    generator = torch.Generator().manual_seed(step + 1)
    gradient_OI, score_OI = (torch.randn(weight_OI.shape, generator=generator) for _ in range(2))
    logit_OGC = torch.randn(12, 4, 6, generator=generator)  # of 2:4, the one end in groups here
    return Moment(step, STEPS, seed=3, gradient_OI=gradient_OI, score_OI=score_OI, logit_OGC=logit_OGC)


@pytest.mark.parametrize(("name", "end"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_ends_with_the_zeros_of_its_pattern(name: str, end: Pattern, dtype: torch.dtype) -> None:
    """Called at every step, as some are in every pass, with weights that move in between."""
    method, weight_OI = fitting(name, end), weight(dtype)
    for step in range(STEPS + 1):
        made_OI = method.update(weight_OI, moment(step, weight_OI))
        assert made_OI.shape == weight_OI.shape
        assert made_OI.dtype == dtype
        if not method.masks_forward:
            weight_OI = made_OI + 0.1 * (made_OI != 0).to(dtype) * weight(dtype).sign()
    assert end.missing(made_OI == 0) == ()
    assert int((made_OI == 0).sum()) == round(end.zero_fraction * 192)


@pytest.mark.parametrize(("name", "end"), CASES, ids=str)
@pytest.mark.parametrize("step", [0, 10, STEPS])
def test_nothing_is_modified_and_the_same_gives_the_same(name: str, end: Pattern, step: int) -> None:
    """Also of a weight that is a view of another, as a transposed one is."""
    method, weight_OI = fitting(name, end), weight().mul_(LayerUnstructured(0.5).keep_largest(weight().abs()))
    before, at = weight_OI.clone(), moment(step, weight_OI)
    made_OI = method.update(weight_OI, at)
    assert torch.equal(weight_OI, before)
    assert torch.equal(method.update(weight_OI, at), made_OI)
    turned_OI = weight_OI.T.contiguous().T
    assert not turned_OI.is_contiguous()
    assert torch.equal(method.update(turned_OI, at), made_OI)


def test_who_makes_blocks() -> None:
    """The others say what they make instead."""
    refused = {name: TRAINED_PRUNERS[name].unfit(Block(0.5, 3, 4)) for name in TRAINED_PRUNERS}
    assert refused == {
        "gradual": "",
        "set": "a share of layers, such as 80%:layer",
        "rigl": "a share of layers, such as 80%:layer",
        "srste": "N:M, such as 2:4",
        "movement": "a pattern of single weights, such as 80%:layer",
        "maskllm": "N:M, such as 2:4",
    }


@pytest.mark.parametrize("name", TRAINED_PRUNERS)
def test_a_pattern_it_refuses_is_answered_with_one_it_makes(name: str) -> None:
    cls: Any = TRAINED_PRUNERS[name]
    assert any(not cls.unfit(end) for end in ENDS)
    shapes = {"a": (12, 16), "b": (16, 16)}
    for end in ENDS:
        if not cls.unfit(end):
            found = cls(pattern=end).patterns(shapes)
            assert found.keys() <= shapes.keys()
            zeros = sum(p.zero_fraction * shapes[n][0] * shapes[n][1] for n, p in found.items())
            assert zeros == pytest.approx(end.zero_fraction * (12 + 16) * 16, rel=1e-9)
