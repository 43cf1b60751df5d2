"""A method side by side with llm-compressor's: seconds and memory, in fresh processes in turn, A B A B A B.

    python -m benchmarks.run cost_peer --method gptq --peer-python PEER/bin/python --rounds 3 --threads 2
    python -m benchmarks.run cost_peer --method wanda --peer-python PEER/bin/python --rounds 3 --threads 2

On the random Llama of :mod:`benchmarks.random_llama`, 128 rows of 512 tokens, the very same on both sides.
Counted in ``s``: from reading the model to the checkpoint on disk, packed where it is quantised; in ours
also the plan, tokenising, the checks of every promise and reading what was packed back. ``process_s`` is the
whole process with its imports, ``cpu_s`` what it used of all cores, ``peak_bytes`` the kernel's high-water
mark of its resident memory, children included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.call import (
    PEER_JOBS,
    add_peer_options,
    config_groups,
    peer_python,
    run_jobs,
    save_ids,
    sparsity_fields,
)
from benchmarks.random_llama import MODEL, TEXT, VOCABULARY, write_random_llama
from benchmarks.run import RESULTS, append_record
from compresskit.measure.record import spread
from compresskit.quant.scheme import parse

OURS, PEER = "ours", "peer"
QUANTIZERS, PRUNERS = ("gptq", "rtn"), ("wanda", "sparsegpt")
MEASURED = ("s", "process_s", "cpu_s", "peak_bytes")
COUNTED = "seconds: reading the model to the checkpoint on disk; imports are not counted."
PEAK = "peak_bytes: the kernel's high-water mark of the process, imports included."


def arguments() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description="A method side by side with llm-compressor's.")
    add_peer_options(parser)
    parser.add_argument("--method", default="gptq", choices=(*QUANTIZERS, *PRUNERS))
    parser.add_argument("--scheme", default="w4a16-g128", help="of a quantizer")
    parser.add_argument("--pattern", default="2:4", help="of a pruner")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def sides(options: argparse.Namespace, python: str | None, place: Path) -> dict[str, tuple[list[str], Any]]:
    """Name -> command and task of each side; the model and the tokens are written into ``place``."""
    shape = {"vocabulary": options.vocabulary, "width": options.width, "layers": options.layers}
    data = {"rows": options.rows, "context_length": options.context_length, "seed": options.seed}
    write_random_llama(place, heads=max(1, options.width // 64), **shape, **data)
    model, text = place / MODEL, str(place / TEXT)
    ignore = ["lm_head"]
    if options.method in PRUNERS:
        stage = {"prune": {"method": options.method, "pattern": options.pattern, "ignore": ignore}}
        # It matches names that end with a dot: plain, the head would be pruned with the rest.
        fields = {**sparsity_fields(options.pattern), "ignore": ["re:.*lm_head"]}
    else:
        stage = {"quantize": {"method": options.method, "scheme": options.scheme, "ignore": ignore}}
        fields = {"config_groups": config_groups(parse(options.scheme)), "ignore": ignore}
    task = {"model": str(model), "threads": options.threads}
    rows = {"data": text, "rows": options.rows, "context_length": options.context_length}
    ours = {**task, **rows, "jobs": [{"name": "job", "stage": stage, "out": str(place / OURS)}]}
    found = {OURS: ([sys.executable, "-m", "benchmarks.peers.compresskit_jobs"], ours)}
    if python:
        ids = save_ids(model, text, rows=options.rows, context_length=options.context_length, place=place)
        job = {"name": "job", "method": options.method, "fields": fields, "out": str(place / PEER)}
        theirs = {**task, "ids": str(ids), "jobs": [job]}
        found[PEER] = ([python, str(PEER_JOBS)], theirs)
    return found


def main() -> None:
    """Measure in turn, print each run, and append a record."""
    options = arguments().parse_args()
    python = peer_python(options)
    runs: dict[str, list[dict[str, float]]] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        both = sides(options, python, Path(scratch))
        for _ in range(options.rounds):
            for side, (command, task) in both.items():
                load = os.getloadavg()[0]
                done = run_jobs(command, task, Path(scratch))
                if done.answer["errors"]:
                    raise SystemExit(f"{side}: {done.answer['errors']}")
                shutil.rmtree(task["jobs"][0]["out"])
                found = {"s": done.answer["seconds"]["job"], "peak_bytes": done.peak_bytes}
                found |= {"process_s": done.process_s, "cpu_s": done.cpu_s, "load_before": load}
                runs.setdefault(side, []).append(found)
                # The environments differ in more than the peer: both are told.
                prefix = "" if side == OURS else "peer "
                versions |= {f"{prefix}{name}": version for name, version in done.answer["versions"].items()}
                print(side, runs[side][-1], flush=True)
    three = {
        f"{side}_{name}": spread([run[name] for run in rows])
        for side, rows in runs.items()
        for name in MEASURED
    }
    values: dict[str, Any] = {name: median for name, (_, median, _) in three.items()}
    if python:
        for name in MEASURED:
            values[f"{name}_ratio"] = values[f"{OURS}_{name}"] / values[f"{PEER}_{name}"]
            print(f"{name}: {values[f'{name}_ratio']:.3f} of llm-compressor's (ratio of medians)")
    is_pruner = options.method in PRUNERS
    form = "pattern" if is_pruner else "scheme"
    chosen = ("method", form, "rows", "context_length", "width", "layers", "vocabulary")
    path = append_record(
        "sparse-cost-peer" if is_pruner else "gptq-peer",
        {**values, "runs": runs},
        subject=f"{options.method} {getattr(options, form)}, random Llama of width {options.width}",
        results=options.results,
        quartiles=three,
        settings={name: getattr(options, name) for name in chosen},
        threads=options.threads,
        seed=options.seed,
        repetitions=options.rounds,
        versions=versions,
        notes=(COUNTED, PEAK) if python else (COUNTED, PEAK, "llm-compressor was left out."),
    )
    print(path)


if __name__ == "__main__":
    main()
