"""What quantisation-aware training wins back of what rounding costs.

    python -m benchmarks.qat --model DIR --train FILE --evaluate FILE --scheme w4a8-channel

From the same dense model: rounded (``rtn``); trained on the grid (``qat``); and fine-tuned for the same steps
on the same rows, then rounded, so that what the text alone teaches is told apart. Each way of training takes
the learning rate, of those given, with the least validation loss after a sixth of the steps; documents of the
evaluation play no part in that. Nats per token on the evaluation documents, of the packed artifact as plain
transformers loads it: a document at a time, BOS first, cut to the context.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compresskit as ck
from benchmarks.run import append_record
from compresskit.stage import Stage

Train = Callable[..., Stage]


def outcome(
    model: Path, stages: tuple[Stage, ...], train: str, evaluate: str | None
) -> tuple[float, float | None]:
    """Nats per evaluated token of the artifact (0 without ``evaluate``), and training's validation loss."""
    recipe = ck.Recipe(model=str(model), data=ck.DataSpec(source=train), stages=stages)
    with tempfile.TemporaryDirectory() as place:
        artifact = ck.run(recipe, Path(place) / "out", measures=())
        held_out = artifact.manifest["stages"][0]["result"]["metrics"].get("validation_loss")
        if evaluate is None:
            return 0.0, held_out
        return nats(artifact.directory, evaluate), held_out


def nats(directory: Path, evaluate: str) -> float:
    """Nats per token over all documents."""
    (record,) = ck.bench(directory, data=evaluate, measures=("quality",), documents=None)
    return float(record.values["nats_per_token"])


def best_rate(model: Path, make: Train, rates: list[float], steps: int, train: str) -> dict[str, float]:
    """Validation loss after a sixth of the steps, by learning rate; empty where there is no choice."""
    few = max(1, steps // 6)
    losses: dict[str, float] = {}
    for rate in rates if len(rates) > 1 else []:
        _, held_out = outcome(model, (make(steps=few, learning_rate=rate),), train, None)
        if held_out is None:
            raise SystemExit(f"{train} has no validation part: give one learning rate, or more text")
        losses[str(rate)] = held_out
    return losses


def way(name: str, scheme: str, fields: dict[str, Any]) -> tuple[Train, tuple[Stage, ...]]:
    """What trains, and what comes after it: ``finetune``, or ``SCALES/LOSS`` with ``/SHARE`` of text."""
    if name == "finetune":
        return (lambda **more: ck.Finetune(**fields, **more)), (ck.Quantize("rtn", scheme=scheme),)
    scales, loss, share = (*name.split("/"), "0")[:3]
    form: dict[str, Any] = {"scheme": scheme, "scales": scales, "loss": loss}
    return (lambda **more: ck.Qat(**form, cross_entropy_weight=float(share), **fields, **more)), ()


def main() -> None:
    """Run it for one model and one scheme and append a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--scheme", default="w4a8-channel")
    parser.add_argument("--ways", default="finetune,dynamic/cross_entropy,learned/forward_kl/0.5")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--learning-rates", default="3e-4,1e-3")
    options = parser.parse_args()
    rates = [float(text) for text in options.learning_rates.split(",")]
    fields: dict[str, Any] = {"batch_size": options.batch_size, "context_length": options.context_length}
    fields |= {"checkpoint_every": 0}
    model, train, evaluate = options.model, options.train, options.evaluate

    rounded = ck.Quantize("rtn", scheme=options.scheme)
    values: dict[str, float] = {"dense": nats(model, evaluate)}
    values["rounded"] = outcome(model, (rounded,), train, evaluate)[0]
    searched: dict[str, dict[str, float]] = {}
    lost = values["rounded"] - values["dense"]
    for name in options.ways.split(","):
        make, then = way(name, options.scheme, fields)
        searched[name] = best_rate(model, make, rates, options.steps, train)
        rate = min(searched[name], key=lambda text: searched[name][text], default=str(rates[0]))
        stages = (make(steps=options.steps, learning_rate=float(rate)), *then)
        values[name], _ = outcome(model, stages, train, evaluate)
        values[f"{name}: share won back"] = (values["rounded"] - values[name]) / lost
        print(json.dumps(values, indent=1), json.dumps(searched), flush=True)
    settings = {**fields, "steps": options.steps, "model": model.name, "scheme": options.scheme}
    settings["learning_rates"] = options.learning_rates
    found = {**values, "validation loss by learning rate": searched}
    print(append_record("qat", found, subject=json.dumps(settings)))


if __name__ == "__main__":
    main()
