"""Shares of ranks: by their speed, whole, in passes that are no larger than asked for."""

from __future__ import annotations

from itertools import chain, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.training.shares import LEAST_GAIN, Divided, Shares, shares_of


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=4), st.integers(1, 4), st.integers(1, 4))
def test_every_row_is_read_once_in_passes_that_fit(speeds: list[float], micro: int, rounds: int) -> None:
    rows = len(speeds) * micro * rounds
    shares = shares_of(speeds, rows=rows, micro_batch_size=micro)
    parts = [shares.parts(rank) for rank in range(len(speeds))]
    assert [len(own) for own in parts] == [shares.passes] * len(speeds)
    assert all(1 <= len(part) <= micro for own in parts for part in own)
    assert list(chain(*chain(*parts))) == list(range(rows))
    if rows // len(speeds) * max(speeds) == rows // len(speeds) * min(speeds):
        assert set(shares.rows) == {rows // len(speeds)}


@pytest.mark.parametrize("speeds", [(3.0, 1.0), (1.0, 5.0), (2.0, 1.9), (1.0, 1.0), (2.0, 3.0, 4.0)])
@pytest.mark.parametrize("micro", [2, 4])
def test_no_other_division_is_done_sooner_in_as_few_passes(speeds: tuple[float, ...], micro: int) -> None:
    rows = 4 * micro * len(speeds)

    def takes(share: tuple[int, ...]) -> float:
        return max(own / speed for own, speed in zip(share, speeds, strict=True))

    shares, equal = shares_of(speeds, rows=rows, micro_batch_size=micro), (rows // len(speeds),) * len(speeds)
    every = [s for s in product(range(shares.passes, rows), repeat=len(speeds)) if sum(s) == rows]
    best = min(takes(share) for share in every)
    if shares.rows == equal:
        assert best >= (1 - LEAST_GAIN) * takes(equal)
    else:
        assert takes(shares.rows) == best


def test_items_of_a_rank() -> None:
    made = Divided(Shares((5, 3), 2), rank=1, steps=4, batch_size=8, begin=2)
    assert list(made) == [[21], [22, 23], [29], [30, 31]]
    assert len(made) == 4


def test_shares_of_other_ranks_or_larger_passes_do_not_fit() -> None:
    shares = Shares((5, 3), 2)
    assert shares.fit(ranks=2, micro_batch_size=3)
    assert not shares.fit(ranks=3, micro_batch_size=3)
    assert not shares.fit(ranks=2, micro_batch_size=2)
