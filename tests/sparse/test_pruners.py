"""Every pruner of the table keeps the contract; each method against its paper, the slow way."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import PatternError, StatisticError
from compresskit.sparse import PRUNERS
from compresskit.sparse.magnitude import Magnitude
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured
from compresskit.sparse.wanda import Wanda

PATTERNS: list[Pattern] = [
    NM(2, 4),
    RowUnstructured(0.5),
    LayerUnstructured(0.5),
    Block(0.5, 4, 8),
    Block(0.5, 1, 8),
]


def stats_of(x: torch.Tensor) -> LayerStats:
    return LayerStats(
        num_tokens=len(x), input_sq_mean_I=x.pow(2).mean(0), input_gram_II=x.t() @ x / len(x), layer="fc"
    )


def pruner(name: str, pattern: Pattern) -> Any:
    cls: Any = PRUNERS[name]
    return cls(pattern=pattern)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PRUNERS)
def test_contract(name: str, dtype: torch.dtype, pattern: Pattern, layout: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(16, 32, dtype=dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "strided":
        weight = torch.randn(16, 64, dtype=dtype)[:, ::2]
    before, stats = weight.clone(), stats_of(torch.randn(40, 32))
    got = pruner(name, pattern).prune(weight, stats)
    assert (got.weight_OI.shape, got.weight_OI.dtype, got.weight_OI.device) == (
        weight.shape,
        dtype,
        weight.device,
    )
    assert (got.keep_OI.shape, got.keep_OI.dtype) == (weight.shape, torch.bool)
    assert torch.equal(weight, before), "prune() must not modify its input"
    assert got.weight_OI.data_ptr() != weight.data_ptr()
    assert not got.weight_OI[~got.keep_OI].any()
    assert not torch.signbit(got.weight_OI[~got.keep_OI]).any(), "a zero is +0"
    assert pattern.missing(got.weight_OI == 0) == ()
    assert got.keep_OI.sum() == 16 * 32 // 2
    assert torch.equal(got.keep_OI, got.weight_OI != 0), "no weight of these becomes zero by chance"
    again = pruner(name, pattern).prune(weight.contiguous(), stats)
    assert torch.equal(again.weight_OI, got.weight_OI), "same values, same result, whatever the strides"


@pytest.mark.parametrize("name", PRUNERS)
def test_zeros_that_are_there_stay(name: str) -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 16).where(torch.rand(8, 16) > 0.3, 0)
    got = pruner(name, NM(2, 4)).prune(weight, stats_of(torch.randn(9, 16)))
    assert not got.weight_OI[weight == 0].any()


@pytest.mark.parametrize("name", PRUNERS)
def test_a_method_is_frozen(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        pruner(name, NM(2, 4)).pattern = NM(1, 4)


def test_magnitude_is_the_slow_loop() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 12)
    want = weight.clone()
    for o in range(5):
        for g in range(0, 12, 4):
            for j in sorted(range(4), key=lambda j: abs(weight[o, g + j].item()))[:2]:
                want[o, g + j] = 0
    assert torch.equal(Magnitude(pattern=NM(2, 4)).prune(weight).weight_OI, want)


def test_wanda_is_the_papers_loop() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16), torch.randn(50, 16) * torch.rand(16) * 4
    norm = x.norm(dim=0)
    want = weight.clone()
    for o in range(6):
        score = (weight[o].abs() * norm).tolist()
        for j in sorted(range(16), key=score.__getitem__)[:8]:
            want[o, j] = 0
    got = Wanda(pattern=RowUnstructured(0.5)).prune(weight, stats_of(x)).weight_OI
    assert torch.equal(got, want)
    assert not torch.equal(got, Magnitude(pattern=RowUnstructured(0.5)).prune(weight).weight_OI)


def test_errors_say_what_to_do() -> None:
    wanda = Wanda(pattern=NM(2, 4))
    with pytest.raises(StatisticError, match="Give more calibration samples, or add the layer to ignore"):
        wanda.prune(torch.randn(4, 8), LayerStats(num_tokens=0))
    with pytest.raises(StatisticError, match=r"shape \(8,\), got \(6,\)"):
        wanda.prune(torch.randn(4, 8), LayerStats(num_tokens=1, input_sq_mean_I=torch.ones(6)))
    with pytest.raises(StatisticError, match="inf or nan"):
        wanda.prune(torch.randn(4, 8), LayerStats(num_tokens=1, input_sq_mean_I=torch.full((8,), torch.inf)))
    with pytest.raises(PatternError, match="divisible by 4"):
        wanda.prune(torch.randn(4, 6), LayerStats(num_tokens=1, input_sq_mean_I=torch.ones(6)))
