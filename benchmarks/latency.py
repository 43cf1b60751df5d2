"""Latency of several checkpoints side by side: a fresh process for each in turn, A B A B.

python -m benchmarks.run latency --rounds 5 original=DIR pruned=DIR artifact=DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.run import append_record
from compresskit.measure import compare_latency
from compresskit.reports import build


def main() -> None:
    """Measure, print the table and append one record for each checkpoint."""
    parser = argparse.ArgumentParser(description="Latency of checkpoints, measured in turn.")
    parser.add_argument("subjects", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each")
    parser.add_argument("--repetitions", type=int, default=20, help="timed rounds in a process")
    parser.add_argument("--prompt-tokens", type=int, default=None)
    parser.add_argument("--decode-tokens", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    records = compare_latency(
        {name: Path(place) for name, _, place in (s.partition("=") for s in options.subjects)},
        rounds=options.rounds,
        repetitions=options.repetitions,
        prompt_tokens=options.prompt_tokens,
        decode_tokens=options.decode_tokens,
        threads=options.threads,
        device=options.device,
    )
    print(build(records).table())
    for r in records:
        kept = {name: getattr(r, name) for name in ("quartiles", "settings", "notes", "device", "threads")}
        path = append_record("latency", r.values, subject=r.subject, repetitions=r.repetitions, **kept)
    print(path)


if __name__ == "__main__":
    main()
