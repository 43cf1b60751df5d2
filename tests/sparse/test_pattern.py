"""Patterns against loops written the slow and obvious way, and the texts they are read from."""

from __future__ import annotations

import pytest
import torch

from compresskit.errors import PatternError
from compresskit.sparse.pattern import NM, Block, LayerUnstructured, Pattern, RowUnstructured, parse_pattern

PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 4), NM(6, 8), RowUnstructured(0.5), LayerUnstructured(0.3)]


def slow_zeros(scores: list[float], count: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


def slow_keep(pattern: Pattern, score: torch.Tensor) -> torch.Tensor:
    rows = score.tolist()
    if isinstance(pattern, LayerUnstructured):
        flat = [s for row in rows for s in row]
        zero = torch.tensor(slow_zeros(flat, round(pattern.zero_fraction * len(flat)))).view(score.shape)
        return ~zero
    size = pattern.of if isinstance(pattern, NM) else len(rows[0])
    count = pattern.of - pattern.keep if isinstance(pattern, NM) else round(pattern.zero_fraction * size)
    return ~torch.tensor(
        [[z for g in range(0, len(row), size) for z in slow_zeros(row[g : g + size], count)] for row in rows]
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_keeps_what_the_slow_loop_keeps(pattern: Pattern, ties: bool) -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 3, (6, 16)).float() if ties else torch.rand(6, 16)
    before = score.clone()
    keep = pattern.keep_largest(score)
    assert torch.equal(keep, slow_keep(pattern, score))
    assert torch.equal(score, before)
    assert keep.dtype == torch.bool
    assert torch.equal(pattern.keep_largest(score.t().contiguous().t()), keep), "strides change nothing"
    assert pattern.missing(~keep) == ()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(20, 32), NM(50, 128), RowUnstructured(0.5)], ids=str)
def test_a_large_weight_is_done_in_parts(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 9, (7, 128)).float()
    whole = pattern.keep_largest(score)
    assert torch.equal(whole, slow_keep(pattern, score))
    monkeypatch.setattr("compresskit.sparse.pattern.select.CHUNK", 260)
    monkeypatch.setattr("compresskit.sparse.pattern.select.CHUNK_OF_FEW", 260)
    assert torch.equal(pattern.keep_largest(score), whole)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 4:8 ", NM(4, 8)),
        ("50%", RowUnstructured(0.5)),
        ("0.5", RowUnstructured(0.5)),
        (".25", RowUnstructured(0.25)),
        ("62.5%", RowUnstructured(0.625)),
        ("50%:ROW", RowUnstructured(0.5)),
        ("50%:Layer", LayerUnstructured(0.5)),
        ("0.1:layer", LayerUnstructured(0.1)),
        ("8:16:pad", NM(8, 16, pad=True)),
        ("50%:16x16", Block(0.5, 16, 16)),
        ("0.25: 1X8", Block(0.25, 1, 8)),
        ("62.5%:3x5:Pad", Block(0.625, 3, 5, pad=True)),
    ],
)
def test_texts(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "4:4",
        "0:4",
        "4:2",
        "0%",
        "100%",
        "120%",
        "50",
        "1.0",
        "half",
        "",
        "2:4:8",
        "nan%",
        "50%:pad",
        "50%:layer:pad",
        "50%:16",
        "50%:0x4",
        "50%:4x0",
        "50%:4x",
        "100%:4x4",
        "2:4:4x4",
        "4:4:pad",
    ],
)
def test_texts_that_are_refused(text: str) -> None:
    with pytest.raises(PatternError, match=r"stages\[0\].pattern: expected .*, got '"):
        parse_pattern(text, where="stages[0].pattern")


def test_zero_fraction() -> None:
    assert [p.zero_fraction for p in PATTERNS] == [0.5, 0.75, 0.25, 0.5, 0.3]


def test_misfits_are_refused_with_the_reason() -> None:
    assert NM(2, 4).misfit(3, 6) == "in_features divisible by 4"
    assert NM(2, 4).misfit(3, 8) == ""
    with pytest.raises(PatternError, match=r"divisible by 4, got a weight of shape \(3, 6\)"):
        NM(2, 4).keep_largest(torch.rand(3, 6))
    assert "rounds to a zero" in RowUnstructured(0.01).misfit(4, 16)
    assert "leaves a weight" in RowUnstructured(0.99).misfit(4, 16)
    with pytest.raises(PatternError, match="rounds to a zero"):
        LayerUnstructured(0.001).keep_largest(torch.rand(4, 16))


def test_missing_names_each_group_and_counts_the_rest() -> None:
    zero = NM(2, 4).keep_largest(torch.rand(3, 16)).logical_not()
    zero[1, 4:8] = torch.tensor([True, False, False, False])
    assert NM(2, 4).missing(zero) == ("row 1, group 1: 1 zero of 2",)
    said = NM(2, 4).missing(torch.zeros(3, 16, dtype=torch.bool))
    assert len(said) == 10
    assert said[0] == "row 0, group 0: 0 zeros of 2"
    assert said[-1] == "and 3 more"
    assert RowUnstructured(0.5).missing(torch.tensor([[True, False, False, False]])) == (
        "row 0: 1 zero of 2",
    )
    assert LayerUnstructured(0.5).missing(torch.tensor([[True, False]] * 2)) == ()
    assert LayerUnstructured(0.5).missing(torch.zeros(2, 2, dtype=torch.bool)) == ("layer: 0 zeros of 2",)


def test_the_overall_count_does_not_excuse_a_group() -> None:
    zero = torch.tensor([[True, True, True, True, False, False, False, False]])
    assert NM(2, 4).missing(zero) == ("row 0, group 1: 0 zeros of 2",)
