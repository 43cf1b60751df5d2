"""Sums over batches against the statistics of all inputs at once."""

from __future__ import annotations

import pytest
import torch

from compresskit.calibration.statistics import SAMPLE, STATISTICS, Accumulator, LayerStats
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


def measured(x_TI: torch.Tensor, needs: frozenset[str], parts: int) -> LayerStats:
    sums = Accumulator(needs, x_TI.shape[1], torch.device("cpu"))
    for part in x_TI.chunk(parts):
        sums.add(part)
    return sums.finish("layer")


@pytest.mark.parametrize("parts", [1, 7, 100])
def test_many_tokens_reach_the_gram_matrix_however_they_come(parts: int) -> None:
    x_TI = torch.randn(3 * SAMPLE + 17, 5)
    gram_II = measured(x_TI, frozenset({"input_gram"}), parts).require("input_gram", 5)
    torch.testing.assert_close(gram_II, x_TI.t() @ x_TI / len(x_TI), rtol=1e-5, atol=1e-5)


def test_inputs_may_change_once_they_were_counted() -> None:
    x_TI = torch.ones(4, 3)
    sums = Accumulator(frozenset({"input_gram"}), 3, torch.device("cpu"))
    sums.add(x_TI)
    x_TI.zero_()
    assert torch.equal(sums.finish().require("input_gram", 3), torch.ones(3, 3))


@pytest.mark.parametrize("tokens", [SAMPLE, 4 * SAMPLE])
@pytest.mark.parametrize("needs", [frozenset({"input_gram"}), frozenset({"input_mean"}), frozenset()])
def test_the_error_is_that_of_the_outputs(tokens: int, needs: frozenset[str]) -> None:
    """Exact where all inputs or their Gram matrix are at hand; near it from a sample."""
    torch.manual_seed(1)
    x_TI = torch.randn(tokens, 40) @ torch.randn(40, 40) + 1
    former_OI = torch.randn(1500, 40)
    new_OI = former_OI + 0.01 * torch.randn(1500, 40)
    x, old, new = x_TI.double(), former_OI.double(), new_OI.double()
    expected = float((x @ (new - old).t()).square().sum() / (x @ old.t()).square().sum())
    stats = measured(x_TI, needs, 5)
    assert (stats.sample_NI is None) == (tokens > SAMPLE and "input_gram" in needs)
    exact = tokens <= SAMPLE or "input_gram" in needs
    assert stats.relative_error(former_OI, new_OI) == pytest.approx(expected, rel=1e-4 if exact else 0.05)
    assert stats.relative_error(former_OI, former_OI) == 0.0
    assert stats.relative_error(0 * former_OI, new_OI) is None
    assert LayerStats(num_tokens=0).relative_error(former_OI, new_OI) is None


def test_a_wide_gram_matrix_is_read_by_halves() -> None:
    torch.manual_seed(1)
    x_TI = torch.randn(1500, 2500)
    former_OI, new_OI = torch.randn(3, 2500), torch.randn(3, 2500)
    expected = (x_TI @ (new_OI - former_OI).t()).square().sum() / (x_TI @ former_OI.t()).square().sum()
    stats = measured(x_TI, frozenset({"input_gram"}), 1)
    assert stats.relative_error(former_OI, new_OI) == pytest.approx(float(expected), rel=1e-4)


def test_a_sample_is_drawn_evenly_and_the_same_each_time() -> None:
    x_TI = torch.arange(10.0 * SAMPLE)[:, None]
    samples = [measured(x_TI, frozenset(), parts).sample_NI for parts in (1, 1, 13)]
    assert all(sample is not None and len(sample) == len(sample.unique()) == SAMPLE for sample in samples)
    assert torch.equal(samples[0], samples[1])
    for sample in samples:
        tenths = torch.histc(sample / SAMPLE, 10, 0, 10)
        assert 60 < tenths.min() <= tenths.max() < 150, "about 102 of each tenth of the tokens"


def test_divided_inputs_have_the_statistics_of_divided_inputs() -> None:
    torch.manual_seed(1)
    x_TI, scale_I = torch.randn(60, 4), torch.tensor([0.5, 1.0, 3.0, 10.0])
    got, expected = measured(x_TI, EVERY, 3).divided_by(scale_I), measured(x_TI / scale_I, EVERY, 3)
    for need in EVERY:
        torch.testing.assert_close(got.require(need, 4), expected.require(need, 4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sample_NI, expected.sample_NI)
