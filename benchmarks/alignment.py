"""A teacher with another tokenizer: does it help a student beside the text, and where?

    python -m benchmarks.run alignment --student DIR --teacher DIR --train FILE --evaluate FILE

The student is cut to half of its parameters, and learns from few documents or from many; in some from their
text alone, in others in part from the teacher, through each alignment. Every arm has the same grid of
learning rates, and an aligned one of shares of the text in the loss; the best point of an arm is chosen by
bits per byte on one half of the held-out documents with one seed, and told on the other half with other
seeds, as is the gain over the text alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import compresskit as ck
from benchmarks.run import RESULTS, append_record, settings_of

TEXT = "cross_entropy"
ALIGNMENTS = {"spans": "forward_kl", "uld": "uld"}
CHOOSING_SEED = 100


def points(arm: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid of an arm."""
    if arm == TEXT:
        return [{"learning_rate": rate} for rate in options.rates]
    pairs = itertools.product(options.rates, options.shares)
    return [{"learning_rate": rate, "cross_entropy_weight": share} for rate, share in pairs]


def bits(
    student: Path, arm: str, point: dict[str, Any], seed: int, source: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Bits per byte after training, on the documents for choosing and on those for telling."""
    names = ("steps", "batch_size", "context_length")
    fields = {name: getattr(options, name) for name in names} | {"checkpoint_every": 0} | point
    stage: Any
    if arm == TEXT:
        stage = ck.Finetune(**fields)
    else:
        stage = ck.Distill(teacher=str(options.teacher), alignment=arm, loss=ALIGNMENTS[arm], **fields)
    data = ck.DataSpec(source=str(source))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        artifact = ck.run(
            ck.Recipe(model=str(student), data=data, stages=(stage,), seed=seed), out, measures=()
        )
        for half in ("choosing", "telling"):
            held_out = str(source.parent / f"{half}.jsonl")
            (record,) = ck.bench(out, data=held_out, measures=("quality",))
            found[half] = float(record.values["bits_per_byte"])
    parts = artifact.manifest["stages"][-1]["result"]["metrics"]["final_parts"]
    return found | {"aligned": float(parts.get("aligned", 0.0))}


def compared(student: Path, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm on one set of documents."""
    values: dict[str, Any] = {}
    for arm in (TEXT, *ALIGNMENTS):
        grid = []
        for point in points(arm, options):
            grid.append(point | bits(student, arm, point, CHOOSING_SEED, source, options))
            print(source.stem, arm, grid[-1], flush=True)
        best = min(grid, key=lambda one: one["choosing"])
        point = {name: best[name] for name in ("learning_rate", "cross_entropy_weight") if name in best}
        by_seed = [
            bits(student, arm, point, seed, source, options)["telling"] for seed in range(options.seeds)
        ]
        values[arm] = {"grid": grid, "best": point, "bits_per_byte_by_seed": by_seed}
        values[arm] |= {"bits_per_byte_mean": mean(by_seed), "aligned": best["aligned"]}
        if arm != TEXT:
            pairs = zip(values[TEXT]["bits_per_byte_by_seed"], by_seed, strict=True)
            gains = [text - mixed for text, mixed in pairs]
            values[arm] |= {"gain_mean": mean(gains), "gain_stdev": stdev(gains) if len(gains) > 1 else 0.0}
        print(source.stem, arm, values[arm], flush=True)
    return values


def written(place: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Sets of documents by their number, and both halves of the held-out ones beside them."""
    held_out = Path(options.evaluate).read_text(encoding="utf-8").splitlines()[: options.documents]
    for start, half in enumerate(("choosing", "telling")):
        (place / f"{half}.jsonl").write_text("\n".join(held_out[start::2]), encoding="utf-8")
    lines = Path(options.train).read_text(encoding="utf-8").splitlines()
    found = {}
    for count in options.train_documents:
        path = place / f"{count}-documents.jsonl"
        path.write_text("\n".join(lines[:count]), encoding="utf-8")
        found[f"{count} documents"] = path
    return found


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="A teacher with another tokenizer beside the text.")
    for name in ("student", "teacher", "train", "evaluate"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=80)
    parser.add_argument("--train-documents", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="of the text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run it on every set of documents and append a record."""
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        cut = ck.Prune("cut", options={"parameters": 0.5, "trim": "width"})
        data = ck.DataSpec(source=str(options.train))
        ck.run(ck.Recipe(model=str(options.student), data=data, stages=(cut,)), place / "cut", measures=())
        sets = written(place, options)
        values = {name: compared(place / "cut", path, options) for name, path in sets.items()}
    named = ("teacher", "train", "evaluate")
    settings = settings_of(options, ("student", *named, "results"), named)
    print(
        append_record(
            "alignment",
            values,
            subject=options.student.name,
            results=options.results,
            settings=settings | {"choosing_seed": CHOOSING_SEED},
            repetitions=options.seeds,
        )
    )
    print(
        json.dumps(
            {name: {arm: one.get("gain_mean") for arm, one in v.items()} for name, v in values.items()}
        )
    )


if __name__ == "__main__":
    main()
