"""Bits per byte of every pruner and pattern, with llm-compressor's figure for the same one beside ours.

    python -m benchmarks.run sparsity --model DIR --model DIR --train FILE --evaluate FILE \\
        --peer-python PEER/bin/python --work DIR

Both sides calibrate on the same token ids and leave the head alone, and layers that an N:M does not divide;
both checkpoints, as saved, are loaded by plain transformers and scored by the same evaluator. Each method
stands plain, with OWL at 70%, and with block reconstruction; Wanda's and SparseGPT's also with
``true_sequential``. A share of zeros is a row's for Wanda, the whole layer's for the others, as in their
papers. How far Wanda's masks agree with llm-compressor's is told as well; since it rounds a row's zeros
down, it is asked for the share that gives it as many as ours has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers.call import (
    PEER_JOBS,
    add_peer_options,
    peer_python,
    save_ids,
    sparsity_fields,
)
from benchmarks.quality import cell, compared, digest_of, figures_of, key_of, score
from benchmarks.run import RESULTS, append_record

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
"""From the worst expected to the best."""
PATTERNS = ("50%", "60%", "70%", "2:4", "4:8")
PEERS_METHODS = ("wanda", "sparsegpt")
BY_ROW = ("wanda",)
PLAIN, OWL, RECONSTRUCT, IN_TURN = "", " owl", " reconstruct", " true_sequential"
OWL_FIELDS = {"sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.08}
LIMIT_PERCENT = 0.2  # how much worse ours may be


def arguments() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description="Bits per byte of every pruner and pattern.")
    add_peer_options(parser)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--train", required=True, help="text to calibrate on")
    parser.add_argument("--evaluate", required=True, help="text to score")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--no-reconstruct", action="store_true", help="leave out the slowest cells")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=None, help="score the first so many; default: all")
    parser.add_argument("--work", type=Path, default=None, help="keep the peer's checkpoints here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def left_alone(model: Path, pattern: str) -> list[str]:
    """The layers that neither side prunes: the head, and those whose width ``pattern`` does not divide."""
    from compresskit.modeling import open_model
    from compresskit.sparse.pattern import parse_pattern

    linears, form = open_model(model).anatomy.linears, parse_pattern(pattern)
    misfits = [n for n, linear in linears.items() if form.misfit(linear.out_features, linear.in_features)]
    return ["lm_head", *sorted({name.rpartition(".")[2] for name in misfits} - {"lm_head"})]


def jobs_of(model: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Cell -> stage: ``wanda 2:4``, ``wanda 70% owl``, ``wanda 2:4 reconstruct`` ..."""
    found: dict[str, dict[str, Any]] = {}
    for pattern in options.patterns:
        for method in options.methods:
            share = pattern.endswith("%") and method not in BY_ROW
            form = f"{pattern}:layer" if share else pattern
            ignore = [n if n == "lm_head" else f"*.{n}" for n in left_alone(model, pattern)]
            fields = {"method": method, "pattern": form, "ignore": ignore}
            found[f"{method} {pattern}"] = fields
            if pattern == "70%":
                found[f"{method} {pattern}{OWL}"] = {**fields, "allocation": "owl"}
            if not options.no_reconstruct:
                found[f"{method} {pattern}{RECONSTRUCT}"] = {**fields, "recover": "reconstruct"}
            if method in PEERS_METHODS:
                found[f"{method} {pattern}{IN_TURN}"] = {**fields, "true_sequential": True}
    return {name: {"prune": fields} for name, fields in found.items()}


def of_model(model: Path, options: argparse.Namespace, python: str | None, place: Path) -> dict[str, Any]:
    """The figures of one model: dense, ours, the peer's, and how far masks agree."""
    options.tokenizer = model
    rows = {"rows": options.rows, "context_length": options.context_length}
    ours = [{"name": name, "stage": stage} for name, stage in jobs_of(model, options).items()]
    task = {"model": str(model), "data": options.train, **rows}
    command = [sys.executable, "-m", "benchmarks.peers.compresskit_jobs"]
    found: dict[str, Any] = {"dense": score(model, options), "peer": {}, "agreement": {}}
    found["ours"], found["versions"] = figures_of(command, task, ours, options, place / "ours")
    if not python:
        return found
    ids = save_ids(model, options.train, **rows, place=place)
    weights = b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))
    home = (options.work or place) / f"sparse-peer-{digest_of(weights + ids.read_bytes())}"
    theirs = peers_jobs(model, options)
    task = {"model": str(model), "ids": str(ids)}
    found["peer"], versions = figures_of([python, str(PEER_JOBS)], task, theirs, options, home)
    found["versions"] |= {f"peer {name}": version for name, version in versions.items()}
    mine = {job["name"]: job for job in ours}
    for job in theirs:
        figures = (found[side][job["name"]] for side in ("ours", "peer"))
        if job["method"] in BY_ROW and not any(isinstance(figure, str) for figure in figures):
            one, other = place / "ours" / key_of(mine[job["name"]]), home / key_of(job)
            found["agreement"][job["name"]] = agreement(one, other)
    return found


def peers_jobs(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells that llm-compressor has."""
    from compresskit.modeling import open_model

    linears = [linear for linear in open_model(model).anatomy.linears.values() if linear.block]
    rows: dict[int, int] = {}
    for linear in linears:
        rows[linear.in_features] = rows.get(linear.in_features, 0) + linear.out_features
    found = []
    for pattern in options.patterns:
        for method in (m for m in PEERS_METHODS if m in options.methods):
            # It matches names that end with a dot: with $ the head would be pruned.
            ignore = [f"re:.*{name}" for name in left_alone(model, pattern)]
            fields = {**sparsity_fields(pattern), "ignore": ignore}
            if method in BY_ROW and fields["mask_structure"] == "0:0":
                fields["sparsity"] = rounded_down_alike(fields["sparsity"], rows)
            found.append({"name": f"{method} {pattern}", "method": method, "fields": fields})
            if pattern == "70%":
                owl = {**fields, **OWL_FIELDS}
                found.append({"name": f"{method} {pattern}{OWL}", "method": method, "fields": owl})
    return found


def rounded_down_alike(share: float, rows: Mapping[int, int]) -> float:
    """The share which, each row's zeros rounded down, gives most nearly the zeros of ``share`` rounded.

    Args:
        share: of each row.
        rows: inputs -> how many rows have so many.
    """
    wanted = {inputs: round(share * inputs) for inputs in rows}

    def amiss(tried: float) -> int:
        return sum(abs(int(inputs * tried) - wanted[inputs]) * count for inputs, count in rows.items())

    return min([share, *(count / inputs + 1e-9 for inputs, count in wanted.items())], key=amiss)


def agreement(one: Path, other: Path) -> float:
    """The part of all weights of pruned layers that both checkpoints keep, or both zero."""
    from compresskit.modeling import open_model

    mine, theirs = open_model(one), open_model(other)
    alike = total = 0
    for layer, linear in mine.anatomy.linears.items():
        if linear.block is not None:
            a, b = mine.weight_OI(layer) == 0, theirs.weight_OI(layer) == 0
            alike += int((a == b).sum())
            total += a.numel()
    return alike / total


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each cell: both figures, what each loses against dense, and how much worse ours is."""
    rows = []
    for name, ours in found["ours"].items():
        row = compared(ours, found["peer"].get(name), found["dense"])
        rows.append({"cell": name, **row, "agreement": found["agreement"].get(name)})
    return rows


def verdicts(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """What falls short, as sentences: cells worse than the peer's, methods out of their order."""
    said = [f"{row['cell']}: {row['ours']}" for row in rows if isinstance(row["ours"], str)]
    said += [f"llm-compressor's {row['cell']}: {row['peer']}" for row in rows if isinstance(row["peer"], str)]
    said += [
        f"{row['cell']} is {row['worse_percent']:.2f}% worse than llm-compressor's."
        for row in rows
        if row["worse_percent"] is not None and row["worse_percent"] > LIMIT_PERCENT
    ]
    by_name = {row["cell"]: row["ours"] for row in rows}
    in_order = [method for method in METHODS if method in options.methods]
    for pattern in options.patterns:
        for variant in (PLAIN, OWL, RECONSTRUCT):
            figures = [(m, by_name.get(f"{m} {pattern}{variant}")) for m in in_order]
            known = [(m, figure) for m, figure in figures if isinstance(figure, float)]
            said += [
                f"{pattern}{variant}: {better} ({low:.4f}) is no better than {worse} ({high:.4f})."
                for (worse, high), (better, low) in pairwise(known)
                if low >= high
            ]
    return said


def table(name: str, dense: float, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{name}, dense {dense:.4f}",
        "",
        "| cell | ours | lost % | theirs | ours worse % | masks alike |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        figures = [cell(row["ours"], ".4f"), cell(row["lost_percent"], ".2f"), cell(row["peer"], ".4f")]
        figures += [cell(row["worse_percent"], "+.2f"), cell(row["agreement"], ".5f")]
        lines.append(f"| {row['cell']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Make the table of each model, say what falls short, and append a record for each."""
    options = arguments().parse_args()
    python = peer_python(options)
    for model in options.model:
        with tempfile.TemporaryDirectory() as place:
            found = of_model(model.absolute(), options, python, Path(place))
        rows = rows_of(found)
        said = verdicts(rows, options)
        print(table(model.name, found["dense"], rows), *said, sep="\n", flush=True)
        settings = {name: getattr(options, name) for name in ("rows", "context_length", "documents")}
        path = append_record(
            "sparsity-peer",
            {"dense": found["dense"], "rows": rows},
            subject=model.name,
            results=options.results,
            settings={
                **settings,
                "left_alone": {pattern: left_alone(model, pattern) for pattern in options.patterns},
                "train": Path(options.train).name,
                "evaluate": Path(options.evaluate).name,
            },
            versions=found["versions"],
            notes=tuple(said),
        )
        print(path)


if __name__ == "__main__":
    main()
