"""The order of training: the same rows in a step whatever divides it, little padding, like work for ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoTokenizer

from compresskit.data.examples import examples
from compresskit.data.spec import DataSpec
from compresskit.training.order import Ordered, balanced


class Rows:
    """Row i is one token, i."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {"input_ids": torch.tensor([index])}


class LongRows(Rows):
    """As :class:`Rows`, of different lengths."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(len(lengths))
        self.lengths = lengths


def numbers(order: Ordered) -> list[int]:
    return [int(order[i]["input_ids"]) for i in range(len(order))]


def work(order: Ordered, lengths: list[int], batch_size: int, micro: int, ranks: int) -> list[list[int]]:
    """Padded tokens of each step and rank, divided as Accelerate divides a loader among ranks."""
    made = [[0] * ranks for _ in range(len(order) // batch_size)]
    items = numbers(order)
    batches = BatchSampler(SequentialSampler(items), micro, drop_last=False)
    for rank in range(ranks):
        for nth, batch in enumerate(BatchSamplerShard(batches, ranks, rank)):
            made[nth * micro * ranks // batch_size][rank] += micro * max(lengths[items[i]] for i in batch)
    return made


def longest(steps: list[list[int]]) -> int:
    return sum(max(step) for step in steps)


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_step_has_the_same_rows_however_it_is_divided(
    lengths: list[int], micro: int, ranks: int, rounds: int, steps: int
) -> None:
    size = micro * ranks * rounds
    plain = numbers(Ordered(Rows(len(lengths)), steps=steps, batch_size=size, seed=1))
    order = Ordered(
        LongRows(lengths), steps=steps, batch_size=size, seed=1, micro_batch_size=micro, ranks=ranks
    )
    made = numbers(order)
    for first in range(0, steps * size, size):
        assert sorted(made[first : first + size]) == sorted(plain[first : first + size])
    assert made == numbers(order)
    backwards = [int(order[i]["input_ids"]) for i in reversed(range(len(order)))]
    assert backwards[::-1] == made


def test_rows_of_equal_length_keep_their_order() -> None:
    options = {"steps": 5, "batch_size": 6, "seed": 2}
    plain = numbers(Ordered(Rows(7), **options))
    assert numbers(Ordered(Rows(7), **options, micro_batch_size=2, ranks=3)) == plain
    for epoch in range(30 // 7):
        assert sorted(plain[epoch * 7 : epoch * 7 + 7]) == list(range(7))


def test_the_longest_rows_share_a_micro_batch_and_the_least_loaded_rank_gets_it() -> None:
    # Two ranks, two rounds of two rows: (9 9) (8 8) | (5 5) (1 1), and rank 1 takes the longer of the second.
    assert balanced([1, 9, 5, 8, 9, 1, 8, 5], 2, 2) == [1, 4, 3, 6, 0, 5, 2, 7]
    assert balanced([3, 1, 2], 1, 1) == [0, 2, 1]


def by_rank(lengths: list[int], order: list[int], micro: int, ranks: int) -> list[int]:
    """Padded tokens of each rank."""
    made = [0] * ranks
    for nth, first in enumerate(range(0, len(order), micro)):
        made[nth % ranks] += micro * max(lengths[i] for i in order[first : first + micro])
    return made


@given(st.lists(st.integers(1, 500), min_size=24, max_size=24))
def test_one_rank_pads_as_little_as_can_be(lengths: list[int]) -> None:
    ordered = sorted(lengths, reverse=True)
    (padded,) = by_rank(lengths, balanced(lengths, 4, 1), 4, 1)
    assert padded == sum(4 * ordered[first] for first in range(0, 24, 4))


@given(st.lists(st.integers(1, 500), min_size=24, max_size=24), st.sampled_from([2, 3]))
def test_the_longest_rank_is_no_longer_than_with_neighbours_alone(lengths: list[int], ranks: int) -> None:
    """Which rank after rank takes in turn: whoever has fewest tokens the longest of the round."""
    order = sorted(range(24), key=lambda i: (-lengths[i], i))
    padded = [0] * ranks
    for first in range(0, 24, 4 * ranks):
        ranked = sorted(range(ranks), key=lambda rank: (padded[rank], rank))
        for nth, rank in enumerate(ranked):
            padded[rank] += 4 * lengths[order[first + 4 * nth]]
    made = balanced(lengths, 4, ranks)
    assert sorted(made) == list(range(24))
    assert max(by_rank(lengths, made, 4, ranks)) <= max(padded)


def test_ranks_exchange_rows_and_micro_batches_until_they_are_level() -> None:
    lengths = [6, 1, 8, 6, 8, 2, 7, 6, 6, 7, 7, 9]
    # Neighbours in turn, 9 8 | 8 7 | 6 6 | 7 7 | 6 6 | 2 1, are 42 tokens against 34.
    assert by_rank(lengths, balanced(lengths, 2, 2), 2, 2) == [38, 38]
    lengths = [8, 8, 9, 5, 7, 4, 6, 8, 1, 7, 5, 1]
    assert by_rank(lengths, balanced(lengths, 1, 3), 1, 3) == [23, 23, 23]


@pytest.mark.parametrize(("batch_size", "micro", "ranks", "at_most"), [(64, 8, 2, 0.6), (256, 8, 4, 0.5)])
def test_real_sentences(
    shared_data: Path, tmp_path: Path, batch_size: int, micro: int, ranks: int, at_most: float
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "bert-base-uncased")
    source = DataSpec(source=str(shared_data / "sst2" / "train.tsv"), documents=20_000)
    lengths = examples(source, tokenizer, context_length=128, cache=tmp_path).lengths.tolist()
    options = {"steps": 40, "batch_size": batch_size, "seed": 0}
    before = work(Ordered(Rows(len(lengths)), **options), lengths, batch_size, micro, ranks)
    order = Ordered(LongRows(lengths), **options, micro_batch_size=micro, ranks=ranks)
    after = work(order, lengths, batch_size, micro, ranks)
    assert longest(after) < at_most * longest(before)
    one_round = {"steps": 40, "batch_size": micro * ranks, "seed": 0}
    before = work(Ordered(Rows(len(lengths)), **one_round), lengths, micro * ranks, micro, ranks)
    order = Ordered(LongRows(lengths), **one_round, micro_batch_size=micro, ranks=ranks)
    after = work(order, lengths, micro * ranks, micro, ranks)
    assert longest(after) == longest(before)  # the rank with the longest row cannot have less
    assert sum(map(sum, after)) < sum(map(sum, before))
