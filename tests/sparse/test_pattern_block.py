"""Blocks against a loop over them, by shapes and scores of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.errors import PatternError
from compresskit.sparse.alps import Alps
from compresskit.sparse.magnitude import Magnitude
from compresskit.sparse.pattern import Block
from compresskit.sparse.sparsegpt import SparseGPT
from compresskit.sparse.wanda import Wanda
from tests.sparse.test_sparsegpt import inputs, stats_of


def slow_keep(pattern: Block, score: torch.Tensor) -> torch.Tensor:
    """Every block cut out, summed, and the least of them zeroed one after another."""
    corners = [
        (slice(o, o + pattern.rows), slice(i, i + pattern.columns))
        for o in range(0, score.shape[0], pattern.rows)
        for i in range(0, score.shape[1], pattern.columns)
    ]
    sums = [float(score[corner].double().square().sum()) for corner in corners]
    keep = torch.ones(score.shape, dtype=torch.bool)
    for n in sorted(range(len(sums)), key=lambda n: (sums[n], n))[: round(pattern.zero_fraction * len(sums))]:
        keep[corners[n]] = False
    return keep


@st.composite
def cases(draw: st.DrawFn, pad: bool) -> tuple[Block, torch.Tensor]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    high, wide = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    out_features, in_features = high * rows, wide * columns
    if pad:
        out_features -= draw(st.integers(0, rows - 1))
        in_features -= draw(st.integers(0, columns - 1))
    zeros = draw(st.integers(1, high * wide - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    top = draw(st.sampled_from([1, 3, 1000]))  # small numbers make ties
    score = torch.randint(0, top + 1, (out_features, in_features), generator=generator).float()
    return Block(zeros / (high * wide), rows, columns, pad=pad), score


@settings(max_examples=150)
@given(st.booleans().flatmap(cases))
def test_it_is_the_loop_over_blocks(case: tuple[Block, torch.Tensor]) -> None:
    pattern, score = case
    before = score.clone()
    keep = pattern.keep_largest(score)
    assert torch.equal(keep, slow_keep(pattern, score))
    assert torch.equal(score, before)
    assert torch.equal(pattern.keep_largest(score.t().contiguous().t()), keep), "strides change nothing"
    assert pattern.missing(~keep) == ()


@settings(max_examples=100)
@given(st.booleans().flatmap(cases), st.data())
def test_one_weight_too_many_is_found(case: tuple[Block, torch.Tensor], data: st.DataObject) -> None:
    pattern, score = case
    zero = ~pattern.keep_largest(score)
    places = zero.nonzero().tolist()
    o, i = places[data.draw(st.integers(0, len(places) - 1))]
    zero[o, i] = False
    row, column = o // pattern.rows * pattern.rows, i // pattern.columns * pattern.columns
    size = zero[row : row + pattern.rows, column : column + pattern.columns].numel()
    (said,) = pattern.missing(zero)
    if size > 1:  # of single weights any that is left may be the one
        assert said.startswith(f"block at row {row}, input {column}: {size - 1} zero")
        assert said.endswith(f"of {size}")


@settings(max_examples=60)
@given(st.booleans().flatmap(cases), st.integers(1, 3))
def test_parts_make_the_share_of_the_whole(case: tuple[Block, torch.Tensor], units: int) -> None:
    pattern, score = case
    step = units * pattern.columns
    starts = range(0, score.shape[1], step)
    keep = torch.cat([pattern.keep_part(score[:, at : at + step], at) for at in starts], 1)
    assert pattern.missing(~keep) == ()
    blocks = pattern.count(*score.shape)
    for at in starts:
        so_far = min(at + step, score.shape[1])
        count = pattern.count(len(score), so_far)
        some = Block(0.5, pattern.rows, pattern.columns, pad=True).summed(keep[:, :so_far].float())
        assert int((some == 0).sum()) == round(pattern.zero_fraction * count)
    assert count == blocks


def test_a_large_weight_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pattern, score = Block(0.5, 3, 4, pad=True), torch.rand(26, 42)
    whole = pattern.keep_largest(score)
    monkeypatch.setattr("compresskit.sparse.pattern.block.CHUNK", 300)
    assert torch.equal(pattern.keep_largest(score), whole)
    assert torch.equal(whole, slow_keep(pattern, score))


def test_what_is_zero_already_adds_nothing() -> None:
    """Sweeps mark it with a number below zero."""
    score = torch.tensor([[-1.0, -1.0, 0.5, 0.5, 1.0, -1.0]])
    assert Block(1 / 3, 1, 2).keep_largest(score).tolist() == [[False, False, True, True, True, True]]
    assert Block(2 / 3, 1, 2).keep_largest(score).tolist() == [[False, False, False, False, True, True]]


def test_shapes_that_do_not_fit() -> None:
    pattern = Block(0.5, 4, 8)
    assert pattern.misfit(8, 16) == ""
    assert pattern.misfit(6, 16) == "out_features divisible by 4"
    assert pattern.misfit(8, 12) == "in_features divisible by 8"
    assert pattern.misfit(6, 12) == "out_features divisible by 4 and in_features divisible by 8"
    assert pattern.padded.misfit(6, 12) == ""
    assert pattern.misfit(4, 8) == "so many blocks that 50% of them rounds to one and leaves one"
    assert "rounds to one" in pattern.padded.misfit(3, 7)
    with pytest.raises(PatternError, match=r"out_features divisible by 4, got a weight of shape \(6, 16\)"):
        pattern.keep_largest(torch.rand(6, 16))
    for rows, columns in ((0, 4), (4, 0)):
        with pytest.raises(PatternError, match="at least 1x1"):
            Block(0.5, rows, columns)
    with pytest.raises(PatternError, match="between 0 and 1"):
        Block(1.0, 4, 4)


def test_fewer_blocks_on_the_way() -> None:
    assert Block(0.8, 4, 4).eased(0.5) == Block(0.4, 4, 4)
    assert Block(0.8, 4, 4, pad=True).eased(1.0) == Block(0.8, 4, 4, pad=True)
    assert Block(0.8, 4, 4).eased(0.0) is None


def test_each_method_zeroes_the_blocks_that_cost_least_by_its_measure() -> None:
    x, pattern = inputs(), Block(0.5, 4, 6)
    stats, weight = stats_of(x), torch.randn(12, 48)
    assert torch.equal(Magnitude(pattern=pattern).prune(weight).keep_OI, slow_keep(pattern, weight))
    by_norm = weight.abs() * x.norm(dim=0)
    assert torch.equal(Wanda(pattern=pattern).prune(weight, stats).keep_OI, slow_keep(pattern, by_norm))
    # One block of inputs, decided on before anything is changed: w over the pivot of the inverse's factor.
    hessian = (x.t() @ x / len(x)).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    pivot = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    got = SparseGPT(pattern=pattern, block=48).prune(weight, stats)
    assert torch.equal(got.keep_OI, slow_keep(pattern, weight / pivot.float()))


def test_what_blocks_cost_the_output_by_method() -> None:
    x, pattern = inputs(), Block(0.5, 2, 6)
    stats, weight = stats_of(x), torch.randn(24, 48)
    errors = [
        float(((method.prune(weight, stats).weight_OI - weight) @ x.t()).square().sum())
        for method in (
            Alps(pattern=pattern),
            SparseGPT(pattern=pattern),
            Wanda(pattern=pattern),
            Magnitude(pattern=pattern),
        )
    ]
    assert errors == sorted(errors)
    assert len(set(errors)) == 4
