"""What a pruned model wins back by training all of its parameters, few of them, or low-rank updates.

    python -m benchmarks.retrain --model DIR --train FILE --evaluate FILE

For each way of pruning and each choice of what is trained: as many optimiser steps on the same rows, every
run in a process of its own, at the learning rate, of those given, with the least validation loss at the end;
documents of the evaluation play no part in that. Validation loss in nats per token before and after; bits per
byte on the evaluation documents of the packed artifact as plain transformers loads it, before and after;
trained parameters; peak resident memory of the process beyond what it had when everything was imported; the
median of a step in seconds, and the processor's time for the whole run, evaluations included; and how many
zeros of the pruned model are not zero in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from operator import sub
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.run import append_record

KEPT = ("validation_loss_before", "validation_loss", "trained_parameters", "trained_fraction")


def child(job: dict[str, Any]) -> None:
    """One run of fine-tuning; prints what it came to as JSON on its last line."""
    import compresskit as ck
    from compresskit import api
    from compresskit.modeling import open_model
    from compresskit.training.adapters.attach import peft_at_work

    with peft_at_work():
        import peft  # noqa: F401
    stage = ck.Finetune(**job["fields"])
    recipe = ck.Recipe(model=job["model"], data=ck.DataSpec(source=job["train"]), stages=(stage,))
    forecast = api.plan(recipe).stages[-1].forecast.memory_bytes
    before = psutil.Process().memory_info().rss
    started = time.process_time()
    artifact = api.run(recipe, job["out"], measures=())
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = artifact.manifest["stages"][-1]
    found = {name: state["result"]["metrics"][name] for name in KEPT}
    (log,) = Path(job["out"]).rglob("*losses.jsonl")
    ends = [record["seconds"] for line in log.open() if "seconds" in (record := json.loads(line))]
    pruned, made = open_model(job["model"]), open_model(job["out"])
    lost = sum(
        int(((pruned.weight_OI(layer) == 0) & (made.weight_OI(layer) != 0)).sum())
        for layer in pruned.anatomy.linears
    )
    found |= {"step_seconds": median(map(sub, ends[1:], ends)), "cpu_seconds": spent, "zeros_lost": lost}
    found |= {"peak_beyond_imports_bytes": peak - before, "memory_forecast_bytes": forecast}
    print(json.dumps(found | {"checks": state["checks"]}))


def bits(directory: Path, options: Any) -> float:
    """Bits per byte over the evaluation documents."""
    import compresskit as ck

    (record,) = ck.bench(directory, data=options.evaluate, measures=("quality",), documents=options.documents)
    return float(record.values["bits_per_byte"])


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    """What a run comes to, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.retrain", "--child", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def best(pruned: Path, fields: dict[str, Any], rates: list[float], options: Any) -> dict[str, Any]:
    """The outcome at the learning rate that validates best, and the validation loss at each."""
    with tempfile.TemporaryDirectory() as place:
        found: dict[float, dict[str, Any]] = {}
        for rate in rates:
            out = str(Path(place) / str(rate))
            job = {"model": str(pruned), "train": options.train, "out": out}
            found[rate] = outcome(job | {"fields": {**fields, "learning_rate": rate}})
        rate = min(rates, key=lambda r: found[r]["validation_loss"])
        return found[rate] | {
            "bits_per_byte": bits(Path(place) / str(rate), options),
            "learning_rate": rate,
            "validation loss by learning rate": {str(r): f["validation_loss"] for r, f in found.items()},
        }


def main() -> None:
    """Run it for one model and append a record."""
    parser = argparse.ArgumentParser(description="Recovery by training few parameters.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--train")
    parser.add_argument("--evaluate")
    parser.add_argument("--documents", type=int, default=300, help="of the evaluation")
    parser.add_argument("--pruned", default="magnitude 2:4,wanda 2:4,wanda 60%")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=256)
    rates_of = "all=3e-3,bias_norm=2e-2,lora=5e-3"
    parser.add_argument("--trainable", default=rates_of, help="with learning rates: all=1e-3:3e-3,lora=5e-3")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    import compresskit as ck

    rows = {"batch_size": options.batch_size, "context_length": options.context_length}
    fields: dict[str, Any] = {"steps": options.steps, "checkpoint_every": 0, **rows}
    pairs = (text.split("=") for text in options.trainable.split(","))
    rates = {name: [float(rate) for rate in text.split(":")] for name, text in pairs}
    values: dict[str, Any] = {"dense": {"bits_per_byte": bits(options.model, options)}}
    with tempfile.TemporaryDirectory() as place:
        for way in options.pruned.split(","):
            method, pattern = way.split()
            stages = (ck.Prune(method, pattern=pattern),)
            recipe = ck.Recipe(
                model=str(options.model), data=ck.DataSpec(source=options.train), stages=stages
            )
            pruned = Path(place) / way.replace(" ", "-")
            ck.run(recipe, pruned, measures=())
            values[way] = {"bits_per_byte": bits(pruned, options)}
            for trainable in rates:
                chosen = {"trainable": trainable} | ({"rank": options.rank} if trainable == "lora" else {})
                values[f"{way}, {trainable}"] = best(pruned, fields | chosen, rates[trainable], options)
                print(way, trainable, json.dumps(values[f"{way}, {trainable}"]), flush=True)
    settings = {**fields, "rank": options.rank, "model": options.model.name, "rates": rates}
    settings["documents"] = options.documents
    print(append_record("retrain", values, subject=json.dumps(settings)))


if __name__ == "__main__":
    main()
