"""Relations between tokens against loops in float64: which tokens, which heads, which of the three."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compresskit.distill.relation import KINDS, Relation
from compresskit.modeling.attention import Attended
from compresskit.training.features import Counted

B, T = 2, 5
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
"""Two documents in the first row, one in the second."""
SENTENCES = Counted.of_sentences(MASK)
TEXT = Counted.of_text(torch.ones(B, T, dtype=torch.int64), POSITIONS)


def attended(heads: int, kv_heads: int, width: int, seed: int) -> Attended:
    generator = torch.Generator().manual_seed(seed)
    counts = (heads, kv_heads, kv_heads)
    return Attended(*(torch.randn(B, T, h, width, generator=generator, dtype=torch.float64) for h in counts))


def seen_by(row: int, token: int, counted: Counted) -> list[int]:
    if counted is SENTENCES:
        return [t for t in range(T) if MASK[row, t]]
    start = token - int(POSITIONS[row, token])
    return list(range(start, token + 1))


def distribution(
    vectors: Tensor, row: int, token: int, head: int, heads: int, seen: list[int]
) -> list[float]:
    """Of one token over those it sees, in one of so many relation heads."""
    flat = [vectors[row, t].flatten().tolist() for t in range(T)]
    width = len(flat[0]) // heads
    parts = [one[head * width : (head + 1) * width] for one in flat]
    scores = [
        sum(a * b for a, b in zip(parts[token], parts[t], strict=True)) / math.sqrt(width) for t in seen
    ]
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def slow(student: Attended, teacher: Attended, counted: Counted, heads: int, of: tuple[str, ...]) -> Tensor:
    found = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        for token in range(T):
            seen = seen_by(row, token, counted)
            for kind in of:
                for head in range(heads):
                    mine, theirs = student[KINDS[kind]], teacher[KINDS[kind]]
                    q = distribution(mine, row, token, head, heads, seen)
                    p = distribution(theirs, row, token, head, heads, seen)
                    found[row, token] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / heads
    return found


@pytest.mark.parametrize("counted", [SENTENCES, TEXT], ids=["sentences", "text"])
@pytest.mark.parametrize(
    ("heads", "of", "used"),
    [(None, ("qq", "kk", "vv"), 2), (4, ("vv",), 4), (1, ("qq", "kk"), 1), (8, ("kk",), 8)],
)
def test_equals_a_loop_over_tokens(
    counted: Counted, heads: int | None, of: tuple[str, ...], used: int
) -> None:
    """A student of 4 heads of 4, two of them of keys, and a teacher of 6 of 8: other widths, other heads."""
    student, teacher = attended(4, 2, 4, seed=1), attended(6, 2, 8, seed=2)
    got = Relation(relation_heads=heads, of=of)(student, teacher, counted.sees_BTT)
    assert got.shape == (B, T)
    counts = counted.share_BT > 0 if counted is SENTENCES else torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(got[counts], slow(student, teacher, counted, used, of)[counts])


@pytest.mark.parametrize("counted", [SENTENCES, TEXT], ids=["sentences", "text"])
def test_a_token_that_is_not_seen_changes_nothing(counted: Counted) -> None:
    student, teacher = attended(2, 2, 4, seed=1), attended(2, 2, 4, seed=2)
    before = Relation()(student, teacher, counted.sees_BTT)
    for side in (student, teacher):
        for vectors in side:
            vectors[0, 4] = 100.0
    after = Relation()(student, teacher, counted.sees_BTT)
    unseen = [t for t in range(T) if 4 not in seen_by(0, t, counted) and t != 4]
    assert unseen
    torch.testing.assert_close(after[0, unseen], before[0, unseen])
    torch.testing.assert_close(after[1], before[1])


def test_gradients_are_the_formulas() -> None:
    student, teacher = attended(2, 1, 4, seed=3), attended(2, 2, 2, seed=4)

    def loss(*mine: Tensor) -> Tensor:
        return SENTENCES.total(Relation(relation_heads=2)(Attended(*mine), teacher, SENTENCES.sees_BTT))

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in student])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_models_have_none_and_padding_is_finite(dtype: torch.dtype) -> None:
    student, teacher = (Attended(*(t.to(dtype) for t in attended(2, 2, 4, seed=s))) for s in (1, 2))
    before = [t.clone() for t in (*student, *teacher)]
    for sees in (SENTENCES.sees_BTT, torch.zeros(B, T, T, dtype=torch.bool)):
        assert Relation()(student, student, sees).abs().max() < 1e-6
        assert Relation()(student, teacher, sees).isfinite().all()
    assert (Relation()(student, teacher, SENTENCES.sees_BTT)[MASK == 1] > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (*student, *teacher), strict=True))


def test_all_tokens_of_a_sentence_count_as_one() -> None:
    loss = torch.arange(10, dtype=torch.float64).reshape(B, T)
    loss[MASK == 0] = math.nan
    assert SENTENCES.total(loss).item() == pytest.approx((0 + 1 + 2 + 3) / 4 + (5 + 6 + 7) / 3)
