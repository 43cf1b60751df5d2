"""Every distillation loss at as many steps, beside cross-entropy alone: which teaches a small student most?

    python -m benchmarks.run losses --model DIR --train FILE --evaluate FILE

Two students of the same teacher: one cut from it to half of its parameters, and one of half its width built
anew. Each has one learning rate, that of those given which serves *cross-entropy* best on its own validation
rows, so that the baseline is not the one that is badly tuned. Then every loss of the table with its default
fields, and mixes with the text; bits per byte on the documents of the evaluation. The best of them and
cross-entropy are run again with other seeds of the order of rows and of new weights: the margin is told with
its spread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import compresskit as ck
from benchmarks.run import RESULTS, append_record, settings_of
from compresskit.distill import LOSSES
from compresskit.modeling import open_model

TEXT = "cross_entropy"
MIXES: dict[str, dict[str, Any]] = {
    "forward_kl, half text": {"loss": "forward_kl", "cross_entropy_weight": 0.5},
    "forward_kl of top 10": {"loss": {"method": "forward_kl", "top_k": 10}},
    "forward_kl at temperature 2": {"loss": "forward_kl", "temperature": 2.0},
    "forward_kl + reverse_kl": {"loss": ["forward_kl", "reverse_kl"]},
}
HALVED = ("hidden_size", "num_attention_heads", "num_key_value_heads")


def students(place: Path, options: argparse.Namespace) -> dict[str, tuple[ck.Recipe, dict[str, Any]]]:
    """Name -> a recipe without stages that train, and the training fields of the student."""
    data = ck.DataSpec(source=options.train)
    cut = ck.Prune("cut", options={"parameters": 0.5, "trim": "width"})
    small = place / "cut"
    ck.run(ck.Recipe(model=str(options.model), data=data, stages=(cut,)), small, measures=())
    config = json.loads((options.model / "config.json").read_text())
    config |= {name: config[name] // 2 for name in HALVED if config.get(name)}
    config["intermediate_size"] = -(-config["intermediate_size"] // 16) * 8
    config.pop("head_dim", None)
    (place / "scratch.json").write_text(json.dumps(config))
    built = ck.Recipe(model=str(place / "scratch.json"), tokenizer=str(options.model), data=data, stages=())
    return {
        "cut": (ck.Recipe(model=str(small), data=data, stages=()), {"steps": options.steps}),
        "scratch": (built, {"steps": options.scratch_steps}),
    }


def trained(
    recipe: ck.Recipe, fields: dict[str, Any], options: argparse.Namespace, *, seed: int = 0
) -> tuple[float, float]:
    """Validation loss of the run, and bits per byte on the evaluation documents."""
    shared = {
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "checkpoint_every": 0,
    }
    stage: Any
    if fields.get("loss", TEXT) == TEXT:
        stage = ck.Finetune(**{k: v for k, v in fields.items() if k != "loss"}, **shared)
    else:
        stage = ck.Distill(teacher=str(options.model), **fields, **shared)
    made = ck.Recipe(
        model=recipe.model, tokenizer=recipe.tokenizer, data=recipe.data, stages=(stage,), seed=seed
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        artifact = ck.run(made, out, measures=())
        loss = artifact.manifest["stages"][-1]["result"]["metrics"]["validation_loss"]
        return float(loss), bits(out, options)


def bits(directory: Path, options: argparse.Namespace) -> float:
    """Bits per byte on the evaluation documents."""
    (record,) = ck.bench(directory, data=options.evaluate, measures=("quality",), documents=options.documents)
    return float(record.values["bits_per_byte"])


def compared(recipe: ck.Recipe, fields: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Every loss for one student."""
    by_rate = {rate: trained(recipe, {**fields, "learning_rate": rate}, options) for rate in options.rates}
    best_rate = min(by_rate, key=lambda rate: by_rate[rate][0])
    fields = {**fields, "learning_rate": best_rate}
    asked: dict[str, dict[str, Any]] = {name: {"loss": name} for name in LOSSES} | MIXES
    found = {TEXT: by_rate[best_rate][1]}
    for name, own in asked.items():
        found[name] = trained(recipe, {**fields, **own}, options)[1]
        print(name, found[name], flush=True)
    best = min(asked, key=lambda name: found[name])
    seeds = range(1, options.seeds)
    text = [found[TEXT], *(trained(recipe, fields, options, seed=s)[1] for s in seeds)]
    taught = [found[best], *(trained(recipe, {**fields, **asked[best]}, options, seed=s)[1] for s in seeds)]
    margins = [a - b for a, b in zip(text, taught, strict=True)]
    return {
        "learning_rate": best_rate,
        "validation_loss_of_cross_entropy": {str(rate): loss for rate, (loss, _) in by_rate.items()},
        "bits_per_byte": found,
        "best": best,
        "best_by_seed": taught,
        "cross_entropy_by_seed": text,
        "margin_mean": mean(margins),
        "margin_stdev": stdev(margins) if len(margins) > 1 else 0.0,
    }


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Every distillation loss beside cross-entropy alone.")
    parser.add_argument("--model", type=Path, required=True, help="the teacher")
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--scratch-steps", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run it for both students and append a record."""
    options = parsed()
    values: dict[str, Any] = {"teacher": bits(options.model, options)}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (recipe, fields) in students(Path(scratch), options).items():
            values[name] = compared(recipe, fields, options) | {
                "parameters": open_model(recipe.model).anatomy.num_parameters if name == "cut" else None
            }
            print(name, json.dumps(values[name], indent=1), flush=True)
    settings = settings_of(options, ("model", "train", "evaluate", "results"), ("train", "evaluate"))
    print(
        append_record(
            "losses",
            values,
            subject=options.model.name,
            results=options.results,
            settings=settings,
            repetitions=options.seeds,
        )
    )


if __name__ == "__main__":
    main()
