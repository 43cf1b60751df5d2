"""What pruning costs, what distillation and fine-tuning win back, and what survives quantisation.

    python -m benchmarks.chain --model DIR --train FILE --evaluate FILE --steps 600

Prunes half of the weights with Wanda, then from that same pruned student runs (a) distillation from the
dense model and (b) cross-entropy fine-tuning, for the same steps, rows and schedule; then quantises (a) to
w8a8. Nats per token on the evaluation documents: a document at a time, BOS first, cut to the context.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import compresskit as ck
from benchmarks.run import append_record
from compresskit.stage import Stage


def nats(out: Path) -> dict[str, float]:
    """Nats per token of every stage, by the stage's name."""
    found = {}
    for path in sorted((out / "records").glob("*.json")):
        if path.stem[0].isdigit() and "." not in path.stem:
            quality = next(r for r in json.loads(path.read_text()) if r["kind"] == "quality")
            found[path.stem] = float(quality["values"]["nats_per_token"])
    return found


def main() -> None:
    """Run it for some seeds and append a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cross-entropy-weight", type=float, default=0.0)
    parser.add_argument("--pattern", default="50%")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    fields = {
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "checkpoint_every": 0,
    }
    share = options.cross_entropy_weight
    prune = ck.Prune("wanda", pattern=options.pattern)
    quantize = ck.Quantize("rtn", scheme="w8a8")
    chains: dict[str, tuple[Stage, ...]] = {
        "distilled": (prune, ck.Distill(**fields, cross_entropy_weight=share), quantize),
        "fine-tuned": (prune, ck.Finetune(**fields)),
    }
    runs = []
    for seed in range(options.seeds):
        row: dict[str, float] = {}
        for label, stages in chains.items():
            recipe = ck.Recipe(
                model=str(options.model),
                data=ck.DataSpec(source=options.train, validation_fraction=0.0),
                evaluation=ck.DataSpec(source=options.evaluate),
                stages=stages,
                seed=seed,
            )
            with tempfile.TemporaryDirectory() as place:
                ck.run(recipe, Path(place) / "out", measures=("quality",), documents=None)
                found = nats(Path(place) / "out")
            row |= {"dense": found["0-source"], "pruned": found["1-prune"], label: list(found.values())[2]}
            if len(stages) == 3:
                row["distilled w8a8"] = found["3-quantize"]
        lost = row["pruned"] - row["dense"]
        for label in ("distilled", "fine-tuned", "distilled w8a8"):
            row[f"{label} won back"] = (row["pruned"] - row[label]) / lost
        runs.append(row)
        print(json.dumps(row, indent=1), flush=True)
    settings = {**fields, "cross_entropy_weight": share, "pattern": options.pattern}
    settings |= {"model": options.model.name, "precision": "fp32"}
    print(append_record("chain", {"runs": runs}, subject=json.dumps(settings)))


if __name__ == "__main__":
    main()
