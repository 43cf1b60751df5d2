"""Sums over batches against the statistics of all inputs at once."""

from __future__ import annotations

import pytest
import torch

from compresskit.calibration.statistics import STATISTICS, Accumulator, LayerStats
from compresskit.errors import StatisticError

EVERY = frozenset(STATISTICS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_add_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_TI = (torch.randn(50, 6) * 3 + 1).to(dtype)
    sums = Accumulator(EVERY, 6, torch.device("cpu"))
    for part in x_TI.split([7, 0, 13, 30]):
        sums.add(part)
    stats = sums.finish("layer")
    x = x_TI.double()
    assert (stats.num_tokens, stats.layer) == (50, "layer")
    expected = {
        "input_mean": x.mean(0),
        "input_sq_mean": x.pow(2).mean(0),
        "input_abs_mean": x.abs().mean(0),
        "input_abs_max": x.abs().max(0).values,
        "input_gram": sum(torch.outer(t, t) for t in x) / 50,
    }
    for need, value in expected.items():
        got = stats.require(need, 6)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-6)


def test_many_tokens_lose_no_precision() -> None:
    """A float32 sum of this many ones would stop at 2**24."""
    sums = Accumulator(frozenset({"input_sq_mean"}), 1, torch.device("cpu"))
    sums.add(torch.full((1, 1), 2.0**12))
    for _ in range(50):
        sums.add(torch.ones(1, 1))
    assert sums.finish().require("input_sq_mean", 1).item() == pytest.approx((2**24 + 50) / 51, rel=1e-7)
    assert (torch.tensor(2.0**24) + 1).item() == 2**24


def test_only_what_is_asked_for_is_kept() -> None:
    sums = Accumulator(frozenset({"input_sq_mean"}), 3, torch.device("cpu"))
    sums.add(torch.ones(2, 3))
    stats = sums.finish()
    assert stats.input_gram_II is None
    assert stats.input_mean_I is None
    with pytest.raises(StatisticError, match="not collected"):
        stats.require("input_gram", 3)
    with pytest.raises(KeyError, match="input_kurtosis"):
        Accumulator(frozenset({"input_kurtosis"}), 3, torch.device("cpu"))


def test_unusable_statistics_say_why() -> None:
    ones = torch.ones(4)
    with pytest.raises(StatisticError, match=r"up_proj: input_sq_mean.*no calibration tokens.*add the layer"):
        LayerStats(num_tokens=0, input_sq_mean_I=ones, layer="up_proj").require_input_sq_mean(4)
    with pytest.raises(StatisticError, match=r"shape \(5,\), got \(4,\)"):
        LayerStats(num_tokens=1, input_sq_mean_I=ones).require_input_sq_mean(5)
    with pytest.raises(StatisticError, match="inf or nan"):
        LayerStats(num_tokens=1, input_sq_mean_I=ones / 0).require_input_sq_mean(4)
    with pytest.raises(StatisticError, match=r"shape \(4, 4\)"):
        LayerStats(num_tokens=1, input_gram_II=ones).require("input_gram", 4)
    assert LayerStats(num_tokens=1, input_sq_mean_I=ones).require_input_sq_mean(4) is ones
