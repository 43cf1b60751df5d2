"""How evenly the rows of a step are divided among ranks: tokens of the longest rank over the mean.

    python -m benchmarks.run balance --model DIR --train train.jsonl

Every document is a row of its own length, as sentences and labelled examples are when they train. Steps are
divided as training divides them, and beside it as they come, at random. Tokens are those a rank computes,
padding included; the figures depend on nothing but the rows. Packed rows are of one length: there the longest
rank is the mean.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.run import RESULTS, append_record, settings_of
from compresskit.data.examples import examples
from compresskit.data.spec import DataSpec
from compresskit.modeling import load_tokenizer
from compresskit.training.order import balanced


def loads(lengths: list[int], order: list[int], micro: int, ranks: int) -> list[int]:
    """Tokens of each rank in a step whose rows are taken in ``order``."""
    padded = [0] * ranks
    for nth, first in enumerate(range(0, len(order), micro)):
        padded[nth % ranks] += micro * max(lengths[i] for i in order[first : first + micro])
    return padded


def divided(lengths: torch.Tensor, options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Of all whole steps of one pass: the longest rank over the mean, and tokens that are padding."""
    generator = torch.Generator().manual_seed(options.seed)
    shuffled = lengths[torch.randperm(len(lengths), generator=generator)]
    steps = [s.tolist() for s in shuffled.split(options.batch_size) if len(s) == options.batch_size]
    found = {}
    for name in ("balanced", "random"):
        over, tokens = [], 0
        for step in steps:
            every = list(range(len(step)))
            order = balanced(step, options.micro_batch_size, ranks) if name == "balanced" else every
            padded = loads(step, order, options.micro_batch_size, ranks)
            over.append(max(padded) / mean(padded) - 1)
            tokens += sum(padded)
        real = sum(map(sum, steps))
        found[name] = {
            "longest_over_mean_mean": mean(over),
            "longest_over_mean_worst": max(over),
            "padding_fraction": 1 - real / tokens,
        }
    return {"steps": len(steps), **found}


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="How evenly ranks are loaded.")
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer reads the documents")
    parser.add_argument("--train", required=True)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Divide one pass over the documents, and append a record."""
    options = parsed()
    with tempfile.TemporaryDirectory() as cache:
        rows = examples(
            DataSpec(source=options.train),
            load_tokenizer(options.model),
            context_length=options.context_length,
            cache=Path(cache),
        )
        lengths = torch.as_tensor([int(n) for n in rows.lengths])
    values: dict[str, Any] = {
        "rows": len(lengths),
        "tokens": {"mean": float(lengths.float().mean()), "longest": int(lengths.max())},
    }
    values |= {f"{ranks} ranks": divided(lengths, options, ranks) for ranks in options.ranks}
    print(values)
    settings = settings_of(options, ("model", "train", "results"), ("train",))
    subject = f"tokenizer of {options.model.name}"
    print(append_record("balance", values, subject=subject, results=options.results, settings=settings))


if __name__ == "__main__":
    main()
