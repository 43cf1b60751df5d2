"""Padded patterns against weights that really have more inputs and outputs, all zero."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from compresskit.errors import PatternError
from compresskit.sparse import PRUNERS
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured
from tests.sparse.test_sparsegpt import inputs, stats_of

PATTERNS: list[NM | Block] = [
    NM(8, 16),
    NM(5, 9),
    NM(1, 13),
    Block(0.5, 4, 8),
    Block(0.4, 3, 11),
    Block(0.5, 7, 4),
    Block(0.5, 1, 16),
]


@pytest.mark.parametrize("plain", PATTERNS, ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_it_is_the_padded_weight_cut_to_size(name: str, plain: NM | Block) -> None:
    x, method = inputs(features=44), cast(Any, PRUNERS[name])
    weight = torch.randn(10, 44)
    rows, columns = (1, plain.of) if isinstance(plain, NM) else (plain.rows, plain.columns)
    rows, columns = -10 % rows, -44 % columns
    assert rows or columns
    wide = pad(weight, (0, columns, 0, rows))
    want = method(pattern=plain).prune(wide, stats_of(pad(x, (0, columns))))
    got = method(pattern=plain.padded).prune(weight, stats_of(x))
    assert torch.equal(got.keep_OI, want.keep_OI[:10, :44])
    torch.testing.assert_close(got.weight_OI, want.weight_OI[:10, :44], rtol=1e-3, atol=1e-3)
    assert plain.padded.missing(got.weight_OI == 0) == ()
    assert plain.missing(want.weight_OI == 0) == ()


@settings(max_examples=150)
@given(st.integers(2, 20), st.integers(1, 19), st.integers(1, 50), st.integers(0, 999), st.booleans())
def test_groups_one_by_one(of: int, keep: int, in_features: int, seed: int, ties: bool) -> None:
    """The last group is short, and lacks as many zeros as it lacks inputs."""
    keep = min(keep, of - 1)
    pattern = NM(keep, of, pad=True)
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(3, in_features, generator=generator)
    score = (score * 3).floor() if ties else score
    if in_features <= keep:
        assert pattern.misfit(3, in_features) == f"more than {keep} in_features"
        return
    got = pattern.keep_largest(score)
    for row, kept in zip(score.tolist(), got.tolist(), strict=True):
        for start in range(0, in_features, of):
            group = row[start : start + of]
            zeros = max(0, len(group) - keep)
            least = sorted(range(len(group)), key=lambda i: (group[i], i))[:zeros]
            assert [i for i in range(len(group)) if not kept[start + i]] == sorted(least)
    assert pattern.missing(~got) == ()
    if in_features % of == 0:
        assert torch.equal(got, NM(keep, of).keep_largest(score))
    zero = ~got
    o, i = zero.nonzero().tolist()[seed % int(zero.sum())]
    zero[o, i] = False
    wanted = min(of, in_features - i // of * of) - keep
    word = "zero" if wanted == 2 else "zeros"
    assert pattern.missing(zero) == (f"row {o}, group {i // of}: {wanted - 1} {word} of {wanted}",)


def test_172_inputs_by_sixteens() -> None:
    """Ten groups of 16 with 8 zeros each, one of 12 with 4."""
    keep = NM(8, 16).padded.keep_largest(torch.rand(5, 172))
    assert (~keep).sum(1).tolist() == [84] * 5
    assert (~keep[:, 160:]).sum(1).tolist() == [4] * 5


def test_what_is_zero_already_does_not_take_the_place_of_padding() -> None:
    """Padding is the first of the zeros, before weights that are marked as zero."""
    score = torch.tensor([[-1.0, 3.0, 1.0, 2.0, -1.0]])
    assert NM(2, 3).padded.keep_largest(score).tolist() == [[False, True, True, True, True]]


def test_patterns_with_nothing_to_divide_stay_what_they_are() -> None:
    for pattern in (RowUnstructured(0.5), LayerUnstructured(0.5)):
        same: Pattern = pattern.padded
        assert same is pattern
    assert NM(2, 4).padded == NM(2, 4, pad=True) == NM(2, 4).padded.padded
    assert NM(2, 4).padded.eased(0.5) == NM(3, 4, pad=True)


def test_a_layer_with_fewer_inputs_than_a_group_keeps() -> None:
    with pytest.raises(PatternError, match=r"more than 8 in_features, got a weight of shape \(4, 8\)"):
        NM(8, 16).padded.keep_largest(torch.rand(4, 8))
