"""Zeros made while a model trains, against zeros made at once and as many steps of training after.

    python -m benchmarks.gradual --model DIR --train FILE --evaluate FILE --pattern 80%:layer

Every way has as many optimiser steps on the same rows and ends with the same share of zeros; a way is
``gradual``, ``set`` or ``rigl``, which train towards them, or a one-shot method (``magnitude``, ``wanda``)
that prunes first, with ``/LOSS`` of the training: ``cross_entropy``, or ``forward_kl`` from the dense model;
``+FEATURES`` after it, such as ``+squarehead``, adds a feature loss from the dense model.
Each takes the learning rate, of those given, with the least validation loss at the end of the whole training;
documents of the evaluation play no part in that. Bits per byte on the evaluation documents, of the packed
artifact as plain transformers loads it: a document at a time, BOS first, cut to the context.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import compresskit as ck
from benchmarks.run import append_record
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.stage import Stage

TEXT = "cross_entropy"


def stages(way: str, pattern: str, fields: dict[str, Any], model: Path) -> tuple[Stage, ...]:
    """The stages of ``way`` for ``model``, the last of which trains."""
    method, _, learnt = way.partition("/")
    loss, _, features = learnt.partition("+")
    fields = {**fields, **({"features": features, "teacher": str(model)} if features else {})}
    if method in TRAINED_PRUNERS:
        return (ck.SparseTrain(method=method, pattern=pattern, loss=loss or TEXT, **fields),)
    after = ck.Finetune(**fields) if learnt == TEXT else ck.Distill(loss=loss, **fields)
    return (ck.Prune(method, pattern=pattern), after)


def bits(directory: Path, evaluate: str) -> float:
    """Bits per byte over all documents."""
    (record,) = ck.bench(directory, data=evaluate, measures=("quality",), documents=None)
    return float(record.values["bits_per_byte"])


def best(
    model: Path, way: str, rates: list[float], pattern: str, fields: dict[str, Any], options: Any
) -> dict[str, Any]:
    """The outcome at the learning rate that validates best, and the validation loss at each."""
    held_out: dict[float, float] = {}
    with tempfile.TemporaryDirectory() as place:
        for rate in rates:
            made = stages(way, pattern, {**fields, "learning_rate": rate}, model)
            recipe = ck.Recipe(model=str(model), data=ck.DataSpec(source=options.train), stages=made)
            artifact = ck.run(recipe, Path(place) / str(rate), measures=())
            result = artifact.manifest["stages"][-1]["result"]
            held_out[rate] = result["metrics"]["validation_loss"]
        rate = min(rates, key=held_out.__getitem__)
        (record,) = ck.bench(Path(place) / str(rate), data=options.evaluate, measures=("size",))
        return {
            "bits_per_byte": bits(Path(place) / str(rate), options.evaluate),
            "zero_fraction": record.values["zero_fraction"],
            "learning_rate": rate,
            "validation loss by learning rate": {str(r): loss for r, loss in held_out.items()},
        }


def main() -> None:
    """Run it for one model and append a record."""
    parser = argparse.ArgumentParser(description="Gradual pruning against one-shot pruning.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--pattern", default="80%:layer")
    ways = "magnitude/cross_entropy,wanda/cross_entropy,wanda/forward_kl"
    parser.add_argument("--ways", default=f"{ways},gradual/cross_entropy,gradual/forward_kl")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--learning-rates", default="3e-3,1e-2")
    options = parser.parse_args()
    fields: dict[str, Any] = {"steps": options.steps, "batch_size": options.batch_size}
    fields |= {"context_length": options.context_length, "checkpoint_every": 0}
    rates = [float(text) for text in options.learning_rates.split(",")]

    values: dict[str, Any] = {"dense": {"bits_per_byte": bits(options.model, options.evaluate)}}
    for way in options.ways.split(","):
        values[way] = best(options.model, way, rates, options.pattern, fields, options)
        print(way, json.dumps(values[way]), flush=True)
    settings = {**fields, "model": options.model.name, "pattern": options.pattern}
    print(append_record("gradual", values, subject=json.dumps(settings)))


if __name__ == "__main__":
    main()
