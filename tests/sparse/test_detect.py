"""The pattern found is the pattern made, of many; a weight too many is one too many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresskit.sparse.detect import detect
from compresskit.sparse.pattern import parse_pattern


def made(text: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Zeros (O, I) of a pattern, otherwise anywhere."""
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return ~parse_pattern(text).keep_largest(score)


def blocks(rows: int, columns: int, height: int, width: int, share: float, seed: int = 0) -> Tensor:
    grid = torch.rand(rows // height, columns // width, generator=torch.Generator().manual_seed(seed))
    return (grid < share).repeat_interleave(height, 0).repeat_interleave(width, 1)


def holds(zero_OI: Tensor, keep: int, of: int) -> bool:
    """The slow and obvious check of N:M."""
    rows = zero_OI.tolist()
    return all(
        sum(not zero for zero in row[start : start + of]) <= keep
        for row in rows
        for start in range(0, len(row), of)
    )


def weaken(zero_OI: Tensor, seed: int = 0) -> Tensor:
    """One zero, anywhere, becomes a weight."""
    places = zero_OI.nonzero()
    row, column = places[torch.randint(len(places), (), generator=torch.Generator().manual_seed(seed))]
    changed = zero_OI.clone()
    changed[row, column] = False
    return changed


@pytest.mark.parametrize("shape", [(64, 64), (172, 64), (256, 96), (16, 480)])
@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8", "5:8", "8:16", "1:16", "16:32"])
def test_n_of_m(text: str, shape: tuple[int, int]) -> None:
    zero = made(text, *shape)
    found = detect(zero)
    assert str(found) == text
    assert found.zero_fraction == pytest.approx(parse_pattern(text).zero_fraction)
    keep, of = map(int, text.split(":"))
    for seed in range(3):
        near = weaken(zero, seed)
        other = detect(near)
        assert other.group != (keep, of), "one weight too many"
        assert other.group is None or holds(near, *other.group)


@pytest.mark.parametrize("text", ["3:6", "2:3", "5:12", "7:24"])
def test_groups_that_are_no_power_of_two(text: str) -> None:
    assert str(detect(made(text, 96, 96))) == text


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
def test_zeros_of_a_quantiser_do_no_harm(text: str) -> None:
    more = torch.rand(128, 128, generator=torch.Generator().manual_seed(5)) < 0.06
    assert str(detect(made(text, 128, 128) | more)) == text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [10, 50, 70, 90, 98])
def test_what_chance_explains_is_no_pattern(share: int, seed: int) -> None:
    assert str(detect(made(f"{share}%:layer", 128, 128, seed))) == "unstructured"
    rows = detect(made(f"{share}%", 128, 100, seed))
    assert str(rows) == "even rows"
    assert rows.zero_fraction == pytest.approx(share / 100)
    assert str(detect(weaken(made(f"{share}%", 128, 100, seed)))) == "unstructured"


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (1, 4), (8, 1), (16, 16), (32, 8), (128, 128)])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_blocks(size: tuple[int, int], share: float) -> None:
    rows, columns = (1024, 1024) if max(size) > 32 else (128, 256)
    zero = blocks(rows, columns, *size, share)
    found = detect(zero)
    assert (found.block, found.group) == (size, None)
    assert found.block_fraction == pytest.approx(float(zero.float().mean()))
    broken = detect(weaken(zero))
    count = rows * columns // (size[0] * size[1])
    assert broken.block == size
    assert broken.block_fraction == pytest.approx(found.block_fraction - 1 / count), "that block is not zero"


@pytest.mark.parametrize(
    ("text", "shape"),
    [("8:16", (64, 172)), ("2:4", (64, 90)), ("4:8", (64, 44)), ("1:4", (16, 31)), ("16:32", (64, 172))],
)
def test_a_last_group_that_is_short(text: str, shape: tuple[int, int]) -> None:
    zero = made(f"{text}:pad", *shape)
    found, (keep, of) = detect(zero), map(int, text.split(":"))
    assert str(found) == text
    assert found.zero_fraction == float(zero.double().mean())
    last = shape[1] // of * of
    for column in range(last, shape[1]):
        broken = zero.clone()
        broken[0, column] = False
        if not holds(broken, keep, of):
            assert detect(broken).group != (keep, of), "a short group counts too"


@pytest.mark.parametrize(("rows", "columns"), [(172, 64), (64, 172), (99, 131)])
def test_blocks_at_the_end_that_are_short(rows: int, columns: int) -> None:
    zero = made("50%:16x16:pad", rows, columns)
    found = detect(zero)
    assert found.block == (16, 16)
    assert found.block_fraction == pytest.approx(0.5, abs=0.01)
    zero[-1, -1] = not zero[-1, -1]
    assert detect(zero).block == (16, 16), "one weight more or less"


def test_whole_rows_and_columns() -> None:
    columns = torch.zeros(60, 48, dtype=torch.bool)
    columns[:, ::3] = True
    assert detect(columns).block == (60, 1), "not the 2:3 that it is too"
    assert detect(columns.T.contiguous()).block == (1, 60)
    assert detect(torch.ones(4, 6, dtype=torch.bool)).block_fraction == 1.0


def test_no_zeros_one_zero_and_no_weights() -> None:
    none = torch.zeros(8, 8, dtype=torch.bool)
    assert str(detect(none)) == "none"
    none[3, 5] = True
    assert (str(detect(none)), detect(none).zero_fraction) == ("unstructured", 1 / 64)
    assert str(detect(torch.zeros(0, 4, dtype=torch.bool))) == "none"
    assert str(detect(torch.tensor([[True]]))) == "unstructured"


@settings(max_examples=60)
@given(st.integers(1, 20), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10_000))
def test_what_is_named_holds(rows: int, columns: int, share: float, seed: int) -> None:
    zero = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    before = zero.clone()
    found = detect(zero)
    assert torch.equal(zero, before)
    assert found.zero_fraction == pytest.approx(float(zero.double().mean()))
    if found.group:
        assert holds(zero, *found.group)
    if found.even:
        assert len(set(zero.sum(1).tolist())) == 1
    if found.block:
        height, width = found.block
        whole = [
            bool(zero[r : r + height, c : c + width].all())
            for r in range(0, rows, height)
            for c in range(0, columns, width)
        ]
        assert found.block_fraction == pytest.approx(sum(whole) / len(whole))


@pytest.mark.parametrize("seed", range(20))
def test_in_a_small_layer_chance_holds_many_a_pattern(seed: int) -> None:
    zero = made("80%:layer", 8, 16, seed)
    assert holds(zero, 3, 4) or holds(zero, 5, 8)
    assert detect(zero).group is None
