"""What choosing a mask costs beside one ``torch.topk`` over the very same groups.

    python -m benchmarks.run masks --side 4096 --rounds 9

The scores of a square fp32 layer become the mask of each pattern, and in the same round a ``torch.topk``
finds as many of the highest in each group, row or layer; of blocks, among their sums of squares, whose making
counts on both sides. It says which scores those are and makes no mask of them. Both take turns, and which
begins changes from round to round, so that whatever else the machine does falls on both. Milliseconds are of
the processor, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.run import RESULTS, append_record
from compresskit.measure.record import spread
from compresskit.sparse.pattern import NM, Block, Pattern, RowUnstructured, parse_pattern

PATTERNS = ("2:4", "4:8", "8:16", "50%:16x16", "50%")


def topk(pattern: Pattern, score_OI: Tensor) -> Tensor:
    """Places of the scores to keep, group by group."""
    if isinstance(pattern, NM):
        return score_OI.view(len(score_OI), -1, pattern.of).topk(pattern.keep).indices
    if isinstance(pattern, Block):
        by_row = score_OI.square().view(len(score_OI), -1, pattern.columns).sum(-1)
        sums = by_row.view(-1, pattern.rows, by_row.shape[1]).sum(1).flatten()
        return sums.topk(len(sums) - round(pattern.zero_fraction * len(sums))).indices
    assert isinstance(pattern, RowUnstructured)
    inputs = score_OI.shape[1]
    return score_OI.topk(inputs - round(pattern.zero_fraction * inputs)).indices


def seconds_of(work: Callable[[], Tensor]) -> float:
    """Of the processor, for doing it once."""
    began = time.process_time()
    work()
    return time.process_time() - began


def take_turns(pattern: Pattern, score_OI: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, for both sides, each of which was done once before."""
    sides = {
        "mask_ms": lambda: pattern.keep_largest(score_OI),
        "topk_ms": lambda: topk(pattern, score_OI),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in sorted(sides, reverse=turn % 2 == 0):
            taken[name].append(1000 * seconds_of(sides[name]))
    return {name: each[1:] for name, each in taken.items()}


def main() -> None:
    """Run it and append a record."""
    parser = argparse.ArgumentParser(description="The cost of choosing masks.")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    score_OI = torch.randn(options.side, options.side).abs()
    ratios: dict[str, float] = {}
    quartiles: dict[str, tuple[float, float, float]] = {}
    for text in PATTERNS:
        taken = take_turns(parse_pattern(text), score_OI, options.rounds)
        mask, other = taken["mask_ms"], taken["topk_ms"]
        ratios[f"{text} ratio_of_medians"] = median(mask) / median(other)
        taken["ratio"] = [ours / theirs for ours, theirs in zip(mask, other, strict=True)]
        found = {f"{text} {name}": spread(each) for name, each in taken.items()}
        print(json.dumps(found), flush=True)
        quartiles |= found
    values = {**ratios, **{name: three[1] for name, three in quartiles.items()}}
    path = append_record(
        "masks",
        values,
        subject=f"{options.side} x {options.side} fp32 scores",
        quartiles=quartiles,
        results=options.results,
        settings={"rounds": options.rounds, "load_after": os.getloadavg()[0]},
        threads=1,
        seed=options.seed,
        repetitions=options.rounds,
    )
    print(path)


if __name__ == "__main__":
    main()
