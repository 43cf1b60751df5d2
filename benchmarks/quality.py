"""Bits per byte of every method and scheme, with llm-compressor's figure for the same one beside ours.

    python -m benchmarks.run quality --model DIR --model DIR --train FILE --evaluate FILE \\
        --peer-python PEER/bin/python --work DIR

Both sides calibrate on the same token ids and leave the same layers alone; both checkpoints, as saved, are
loaded by plain transformers (in float32 for a float32 model) and scored by the same evaluator. One process
for all of llm-compressor's jobs of a model, one for all of ours. In ``--work`` the peer's checkpoints and
figures are kept: a second run on the same tokens makes and scores ours alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.call import (
    PEER_JOBS,
    add_peer_options,
    config_groups,
    peer_python,
    run_jobs,
    save_ids,
)
from benchmarks.run import RESULTS, append_record
from compresskit.quant.scheme import Scheme, parse
from compresskit.timing import default_threads

CELLS = {
    "w8a8": ("rtn", "gptq", "awq", "hqq", "smoothquant"),
    "w8a16": ("rtn", "gptq", "awq", "hqq"),
    "w4a16-g32": ("rtn", "gptq", "awq", "hqq"),
    "w4a16-g64": ("rtn", "gptq", "awq", "hqq"),
    "w4a16-g32-asym": ("rtn", "gptq", "hqq"),
    "w4a8-g32": ("rtn", "gptq", "smoothquant"),
    "fp8": ("rtn", "gptq"),
    "nf4": ("rtn",),
}
METHODS = ("rtn", "gptq", "awq", "hqq", "smoothquant")
PEERS_METHODS = ("rtn", "gptq", "awq", "smoothquant")
LIMIT_PERCENT = 0.2  # how much worse ours may be
PATCHED = "llm-compressor's AWQ pins memory, which fails without an accelerator; it is kept from doing so."
INT8_LIMIT_PERCENT = 0.5  # how much INT8 may lose against the dense model

Figures = dict[str, float | str]  # cell -> bits per byte, or why there is none


def arguments() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description="Bits per byte of every method and scheme.")
    add_peer_options(parser)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--train", required=True, help="text to calibrate on")
    parser.add_argument("--evaluate", required=True, help="text to score")
    parser.add_argument("--schemes", nargs="+", default=tuple(CELLS), choices=tuple(CELLS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=None, help="score the first so many; default: all")
    parser.add_argument("--work", type=Path, default=None, help="keep the peer's checkpoints here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def cells(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(method, scheme) pairs."""
    return [(m, s) for s in options.schemes for m in CELLS[s] if m in options.methods]


def left_alone(model: Path, scheme: Scheme) -> list[str]:
    """The layers that neither side quantises: the head, and those whose width the groups do not divide."""
    from compresskit.modeling import open_model

    linears = open_model(model).anatomy.linears
    wide = (name for name, linear in linears.items() if scheme.misfit(linear.in_features))
    misfits = {name.rpartition(".")[2] for name in wide}
    return ["lm_head", *sorted(misfits - {"lm_head"})]


def score(checkpoint: Path, options: argparse.Namespace) -> float | str:
    """Bits per byte of a checkpoint as plain transformers loads and runs it, or why there is none."""
    from compresskit.data import documents
    from compresskit.data.spec import DataSpec
    from compresskit.measure.load import load_model
    from compresskit.measure.quality import quality
    from compresskit.modeling import load_tokenizer, open_model

    try:
        found = quality(
            load_model(checkpoint),
            load_tokenizer(open_model(options.tokenizer)),
            documents(DataSpec(source=options.evaluate), "all"),
            context_length=options.context_length,
            max_documents=options.documents,
        )
    except Exception as error:  # of any library: the other cells still stand
        said = str(error).splitlines()[0].replace(str(checkpoint), checkpoint.name)
        return f"does not run: {type(error).__name__}: {said[:200]}"
    return found.bits_per_byte


def figures_of(
    command: list[str],
    task: Mapping[str, Any],
    jobs: Iterable[dict[str, Any]],
    options: argparse.Namespace,
    home: Path,
) -> tuple[Figures, dict[str, str]]:
    """The figure of each job, and the versions it was made with.

    ``home`` is for one model and one calibration. A job whose checkpoint lies there already is not run again,
    nor scored again on the same text; all others are run in one process.
    """
    home.mkdir(parents=True, exist_ok=True)
    kept_in = home / "figures.json"
    kept = json.loads(kept_in.read_text()) if kept_in.is_file() else {"scored": {}, "versions": {}}
    text = f"{digest_of(Path(options.evaluate).read_bytes())} {options.documents}"
    scored: Figures = kept["scored"].setdefault(text, {})
    keys = {job["name"]: key_of(job) for job in jobs}
    chosen = [{**job, "out": str(home / keys[job["name"]])} for job in jobs]
    todo = [job for job in chosen if not Path(job["out"]).is_dir()]
    errors: dict[str, str] = {}
    if todo:
        answer = run_jobs(command, {**task, "threads": default_threads(), "jobs": todo}, home).answer
        errors = answer["errors"]
        kept["versions"] |= {keys[job["name"]]: answer["versions"] for job in todo}
    for job in chosen:
        key = keys[job["name"]]
        if key not in scored and job["name"] not in errors:
            scored[key] = score(Path(job["out"]), options)
            kept_in.write_text(json.dumps(kept, indent=1))
    figures = {name: errors.get(name) or scored[key] for name, key in keys.items()}
    told = [kept["versions"].get(key, {}) for key in keys.values()]
    versions = {package: {v[package] for v in told if package in v} for v in told for package in v}
    return figures, {package: " or ".join(sorted(found)) for package, found in versions.items()}


def key_of(job: Mapping[str, Any]) -> str:
    """The name of the checkpoint that a job makes, inside its home."""
    return digest_of(json.dumps(job, sort_keys=True).encode())


def digest_of(content: bytes) -> str:
    """A few digits that tell one content from another."""
    return hashlib.sha256(content).hexdigest()[:12]


def of_model(model: Path, options: argparse.Namespace, python: str | None, place: Path) -> dict[str, Any]:
    """The figures of one model: dense, ours, the peer's."""
    options.tokenizer = model
    pairs = cells(options)
    alone = {scheme: left_alone(model, parse(scheme)) for _, scheme in pairs}
    rows = {"rows": options.rows, "context_length": options.context_length}
    jobs = [{"name": f"{m} {s}", "method": m, "scheme": s} for m, s in pairs]
    ours = [
        {
            "name": job["name"],
            "stage": {
                "quantize": {
                    "method": job["method"],
                    "scheme": job["scheme"],
                    "ignore": [n if n == "lm_head" else f"*.{n}" for n in alone[job["scheme"]]],
                }
            },
        }
        for job in jobs
    ]
    task = {"model": str(model), "data": options.train, **rows}
    found: dict[str, Any] = {"cells": pairs, "dense": score(model, options), "left alone": alone, "peer": {}}
    command = [sys.executable, "-m", "benchmarks.peers.compresskit_jobs"]
    found["ours"], found["versions"] = figures_of(command, task, ours, options, place / "ours")
    if python:
        ids = save_ids(model, options.train, **rows, place=place)
        theirs = [
            {
                "name": job["name"],
                "method": job["method"],
                "fields": {
                    "config_groups": config_groups(parse(job["scheme"])),
                    "ignore": [f"re:.*{name}$" for name in alone[job["scheme"]]],
                },
            }
            for job in jobs
            if job["method"] in PEERS_METHODS and job["scheme"] != "nf4"
        ]
        weights = b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))
        home = (options.work or place) / f"peer-{digest_of(weights + ids.read_bytes())}"
        task = {"model": str(model), "ids": str(ids)}
        found["peer"], versions = figures_of([python, str(PEER_JOBS)], task, theirs, options, home)
        found["versions"] |= {f"peer {name}": version for name, version in versions.items()}
    return found


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each cell: both figures, what each loses against dense, and how much worse ours is."""
    rows = []
    for method, scheme in found["cells"]:
        ours, peer = (found[side].get(f"{method} {scheme}") for side in ("ours", "peer"))
        rows.append({"method": method, "scheme": scheme, **compared(ours, peer, found["dense"])})
    return rows


def compared(ours: float | str, peer: float | str | None, dense: float) -> dict[str, Any]:
    """Both figures, what ours loses against the dense model, and how much worse it is than the peer's."""
    row: dict[str, Any] = {"ours": ours, "peer": peer, "worse_percent": None, "lost_percent": None}
    if not isinstance(ours, str):
        row["lost_percent"] = 100 * (ours / dense - 1)
        if isinstance(peer, float):
            row["worse_percent"] = 100 * (ours / peer - 1)
    return row


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short, as sentences."""
    said = []
    by_name = {(row["method"], row["scheme"]): row["ours"] for row in rows}
    for row in rows:
        name = f"{row['method']} {row['scheme']}"
        if isinstance(row["ours"], str):
            said.append(f"{name}: {row['ours']}")
            continue
        if row["worse_percent"] is not None and row["worse_percent"] > LIMIT_PERCENT:
            said.append(f"{name} is {row['worse_percent']:.2f}% worse than llm-compressor's.")
        if row["scheme"] in ("w8a8", "w8a16") and row["lost_percent"] >= INT8_LIMIT_PERCENT:
            said.append(f"{name} loses {row['lost_percent']:.2f}% against the dense model.")
        rtn = by_name.get(("rtn", row["scheme"]))
        four = row["method"] == "gptq" and row["scheme"].startswith("w4")
        if four and isinstance(rtn, float) and row["ours"] >= rtn:
            said.append(f"{name} is no better than rtn: {row['ours']:.4f} against {rtn:.4f}.")
    return said


def cell(value: Any, form: str) -> str:
    """A figure of a table; a figure that is a sentence says why there is none."""
    return "-" if value is None else "failed" if isinstance(value, str) else format(value, form)


def table(name: str, dense: float, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"{name}, dense {dense:.4f}", "", "| scheme | method | ours | lost % | theirs | ours worse % |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        figures = [cell(row["ours"], ".4f"), cell(row["lost_percent"], ".2f")]
        figures += [cell(row["peer"], ".4f"), cell(row["worse_percent"], "+.2f")]
        lines.append(f"| {row['scheme']} | {row['method']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Make the table of each model, say what falls short, and append a record for each."""
    options = arguments().parse_args()
    python = peer_python(options)
    for model in options.model:
        with tempfile.TemporaryDirectory() as place:
            found = of_model(model.absolute(), options, python, Path(place))
        rows = rows_of(found)
        said = verdicts(rows)
        print(table(model.name, found["dense"], rows), *said, sep="\n", flush=True)
        settings = {name: getattr(options, name) for name in ("rows", "context_length", "documents")}
        settings |= {"left_alone": found["left alone"], "train": Path(options.train).name}
        path = append_record(
            "quality-peer",
            {"dense": found["dense"], "rows": rows},
            subject=model.name,
            results=options.results,
            settings={**settings, "evaluate": Path(options.evaluate).name},
            versions=found["versions"],
            notes=(*([PATCHED] if python else []), *said),
        )
        print(path)


if __name__ == "__main__":
    main()
