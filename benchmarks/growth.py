"""How the cost of GPTQ grows with tokens, layers and width: a table, and the exponent of each.

    python -m benchmarks.run growth --threads 1

From a small random Llama each of the three is doubled twice while the other two stay; every point is a fresh
process that runs the whole pipeline. An exponent is the slope of log cost over log size: 1 is proportional,
2 square. ``own_cpu_s`` and ``own_bytes`` are the processor time and the high-water mark of the process beyond
those of the same process that only imports: unlike ``s``, they hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.call import Watched, run_jobs
from benchmarks.random_llama import MODEL, TEXT, write_random_llama
from benchmarks.run import RESULTS, append_record

FACTORS = (1, 2, 4)
BASE: Mapping[str, int] = {"rows": 32, "layers": 2, "width": 256}
COSTS = ("s", "own_cpu_s", "own_bytes")
NAMES = {"rows": "tokens", "layers": "layers", "width": "width"}
CONTEXT_LENGTH, VOCABULARY, HEAD = 256, 4096, 64


def run_point(
    point: Mapping[str, int], options: argparse.Namespace, *, jobs: bool = True
) -> tuple[Watched, float]:
    """One fresh process on a model of its own, and its CPU seconds; only the imports without ``jobs``."""
    fields = {"method": options.method, "scheme": options.scheme, "ignore": ["lm_head"]}
    job = {"name": "job", "stage": {"quantize": fields}}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_random_llama(
            place,
            **point,
            context_length=CONTEXT_LENGTH,
            vocabulary=VOCABULARY,
            heads=point["width"] // HEAD,
            seed=options.seed,
        )
        task = {
            "model": str(place / MODEL),
            "data": str(place / TEXT),
            "rows": point["rows"],
            "context_length": CONTEXT_LENGTH,
            "threads": options.threads,
            "jobs": [{**job, "out": str(place / "out")}] if jobs else [],
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_jobs([sys.executable, "-m", "benchmarks.peers.compresskit_jobs"], task, place)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.answer["errors"]:
        raise SystemExit(f"{dict(point)}: {done.answer['errors']}")
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the line of least squares through log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    """Measure every point, print the table, and append a record."""
    parser = argparse.ArgumentParser(description="Growth of GPTQ's cost in tokens, layers and width.")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each point; the least counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    bare, bare_s = run_point(BASE, options, jobs=False)
    cache: dict[tuple[int, ...], dict[str, float]] = {}
    table: list[dict[str, Any]] = []
    exponents: dict[str, dict[str, float]] = {}
    for axis, name in NAMES.items():
        for factor in FACTORS:
            point = {**BASE, axis: BASE[axis] * factor}
            key = tuple(point.values())
            if key not in cache:
                runs = [run_point(point, options) for _ in range(options.rounds)]
                cache[key] = {
                    "s": min(run.answer["seconds"]["job"] for run, _ in runs),
                    "own_cpu_s": min(seconds for _, seconds in runs) - bare_s,
                    "own_bytes": min(run.peak_bytes for run, _ in runs) - bare.peak_bytes,
                }
            tokens = point["rows"] * CONTEXT_LENGTH
            table.append({"grown": name, "factor": factor, **point, "tokens": tokens, **cache[key]})
            print(table[-1], flush=True)
        rows = table[-len(FACTORS) :]
        exponents[name] = {cost: exponent(FACTORS, [row[cost] for row in rows]) for cost in COSTS}
        print(f"{name}: {exponents[name]}", flush=True)
    path = append_record(
        "growth",
        {
            "table": table,
            "exponents": exponents,
            "bare_bytes": bare.peak_bytes,
            "bare_cpu_s": bare_s,
        },
        subject=f"{options.method} {options.scheme}, random Llamas",
        results=options.results,
        settings={
            "context_length": CONTEXT_LENGTH,
            "rounds": options.rounds,
            "load_after": os.getloadavg()[0],
        },
        threads=options.threads,
        seed=options.seed,
        versions=bare.answer["versions"],
        notes=("At sizes this small fixed costs hold the exponents down.",),
    )
    print(path)


if __name__ == "__main__":
    main()
