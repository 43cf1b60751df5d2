"""A cached teacher beside a live one: tokens a second, the loss curve, bytes on the disk.

    python -m benchmarks.run teacher_cache --text FILE --tokenizer DIR
    python -m benchmarks.run teacher_cache --text FILE --teacher DIR --student DIR

Without models they are random Llamas, by default those of ``distill_peer``, the teacher of three times the
student's parameters; of any width and blocks otherwise. ``head_share`` is what part of their parameters the
output projection is: beside a cache of hidden states the teacher's is multiplied all the same. The same rows
in the same order with each placement of the teacher, in fresh processes in turn; the first steps of each are
not counted, and neither is the pass that makes a cache, whose seconds are told apart. ``curve_percent`` is
the largest deviation of a step's training loss from that beside the live teacher. A cache that keeps a part
of the distribution leaves a part of the loss out, of ``validation_loss``, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

import compresskit as ck
from benchmarks.distill_peer import SHAPES, write_model
from benchmarks.run import RESULTS, append_record
from compresskit.measure.record import spread
from compresskit.modeling import open_model

LIVE = "live"
PLACEMENTS: dict[str, Any] = {
    LIVE: "replicate",
    "hidden": {"method": "cache", "keep": "hidden"},
    "top_k": {"method": "cache", "keep": "top_k", "k": 64},
    "sampled": {"method": "cache", "keep": "sampled", "k": 64},
}
WARMUP = 2


def child(job: dict[str, Any]) -> None:
    """One distillation; prints seconds and losses of its steps as JSON on the last line."""
    stage = ck.Distill(**job["fields"])
    data = ck.DataSpec(source=job["text"], documents=job["documents"], cross_documents=True)
    began = time.perf_counter()
    artifact = ck.run(ck.Recipe(model=job["student"], data=data, stages=(stage,)), job["out"], measures=())
    whole_s = time.perf_counter() - began
    (log,) = Path(job["out"]).rglob("*losses.jsonl")
    steps = [record for line in log.open() if "loss" in (record := json.loads(line))]
    ends = [0.0, *(record["seconds"] for record in steps)]
    metrics = artifact.manifest["stages"][-1]["result"]["metrics"]
    found = {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "losses": [record["loss"] for record in steps],
        "before_steps_s": whole_s - ends[-1],
        "validation_loss": metrics["validation_loss"],
        "faithfulness": {k: v for k, v in metrics.items() if "cache" in k or "teacher" in k},
    }
    print(json.dumps(found))


def outcome(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """What a run comes to, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.teacher_cache", "--child", json.dumps(job)]
    environment = {**os.environ, "COMPRESSKIT_CACHE": str(cache)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(
    options: argparse.Namespace, place: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float]]]:
    """Every placement in turn, ``--rounds`` times over, and the sizes of the models.

    Caches are made in the first round and stay.
    """
    models = {"student": options.student, "teacher": options.teacher}
    if not options.teacher:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        for name in SHAPES:
            models[name] = place / name
            write_model(place / name, tokenizer, *getattr(options, f"{name}_shape"))
    fields = {
        "teacher": str(models["teacher"]),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "learning_rate": options.learning_rate,
        "checkpoint_every": 0,
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for turn in range(options.rounds):
        for name, placement in PLACEMENTS.items():
            job = {"student": str(models["student"]), "text": str(options.text)}
            job["documents"] = options.documents
            job |= {"out": str(place / f"{name}-{turn}")}
            done = outcome(job | {"fields": {**fields, "teacher_placement": placement}}, place / "cache")
            tokens = options.batch_size * options.context_length
            done["tokens_per_s"] = tokens / median(done["seconds"][WARMUP:])
            runs.setdefault(name, []).append(done)
            print(name, {k: v for k, v in done.items() if k not in ("seconds", "losses")}, flush=True)
    return runs, {name: size_of(Path(model)) for name, model in models.items()}


def size_of(model: Path) -> dict[str, float]:
    """Parameters, and the share of them that the output projection is."""
    source = open_model(str(model))
    head = source.config.vocab_size * source.config.hidden_size
    return {"parameters": source.anatomy.num_parameters, "head_share": head / source.anatomy.num_parameters}


def random_name(size: dict[str, float]) -> str:
    """What the record calls the teacher."""
    return f"a random Llama of {size['parameters'] / 1e6:.0f}M parameters"


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="A cached teacher beside a live one.")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="of the random models")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--student", type=Path)
    for name, shape in SHAPES.items():
        parser.add_argument(f"--{name}-shape", type=int, nargs=2, default=shape, help="width and blocks")
    parser.add_argument("--documents", type=int, default=120)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child and (not options.text or bool(options.teacher) != bool(options.student)):
        parser.error("needs --text, and --teacher and --student together or neither")
    if not options.child and not options.teacher and not options.tokenizer:
        parser.error("needs --tokenizer for random models")
    return options


def main() -> None:
    """Measure, and append a record."""
    options = parsed()
    if options.child:
        child(json.loads(options.child))
        return
    with tempfile.TemporaryDirectory() as scratch:
        runs, models = measured(options, Path(scratch))
    true = runs[LIVE][0]["losses"]
    values: dict[str, Any] = {"models": models}
    quartiles = {}
    for name, rounds in runs.items():
        speed = f"{name}_tokens_per_s"
        quartiles[speed] = spread([run["tokens_per_s"] for run in rounds])
        values[speed] = quartiles[speed][1]
        values[f"{name}_speedup"] = values[speed] / values[f"{LIVE}_tokens_per_s"]
        deviations = [abs(a / b - 1) for a, b in zip(rounds[0]["losses"], true, strict=True)]
        values[f"{name}_curve_percent"] = 100 * max(deviations)
        for kept in ("before_steps_s", "validation_loss", "faithfulness"):
            values[f"{name}_{kept}"] = rounds[0][kept]
    settings = ("documents", "steps", "batch_size", "context_length", "learning_rate")
    print(
        append_record(
            "teacher-cache",
            values,
            subject=options.teacher.name if options.teacher else random_name(models["teacher"]),
            results=options.results,
            quartiles=quartiles,
            settings={name: getattr(options, name) for name in settings},
            repetitions=options.rounds,
        )
    )
    print(json.dumps({k: v for k, v in values.items() if "speedup" in k or "curve" in k}, indent=1))


if __name__ == "__main__":
    main()
