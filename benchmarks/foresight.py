"""How near the bytes that `compresskit plan --here` predicts come to those that training holds.

    python -m benchmarks.foresight --shapes 256x4:none,384x5:full

Random Llamas, trained for three steps on random words by two processes (``single``: one; ``hsdp``: four),
with activations kept or computed again. Predicted and measured are bytes of tensors in the fullest process,
from the end of the first step on: on a CPU counted by the allocator, on a GPU by torch. The record has every
combination, the largest error of them, and of each process what it holds of parameters when the optimiser has
stepped: weights, the copy of them that an engine steps, gradients, and the optimiser's states, read off the
live tensors. DeepSpeed's buffers are made as small as the models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import compresskit as ck
from benchmarks.random_llama import MODEL, TEXT, write_random_llama
from benchmarks.run import append_record
from compresskit.foresight.forecast import Forecast, Foresight, here
from compresskit.foresight.verify import Verified, verify

WAYS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp", "tensor 2", "pipeline 2")
PROCESSES = {"single": 1, "hsdp": 4}
"""Where it is another number than 2."""
SMALL = {
    "reduce_bucket_size": 500_000,
    "stage3_max_live_parameters": 500_000,
    "stage3_max_reuse_distance": 500_000,
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 0,
}
"""DeepSpeed's own buffers are for large models: 2 GB that would hide everything else."""


def of_way(foresight: Foresight, way: str, checkpointing: str, rows: int) -> Verified:
    """What one combination comes to."""
    (one,) = foresight.forecasts
    return verify(foresight, one, row_of(one, way, checkpointing, rows))


def row_of(one: Forecast, way: str, checkpointing: str, rows: int) -> Any:
    """The forecast of one combination.

    Raises:
        SystemExit: there is none.
    """
    for row in one.rows:
        made = row.combination
        if (made.strategy, made.checkpointing, made.rows) == (way, checkpointing, rows) and row.peak:
            return row
    raise SystemExit(f"{way}, {checkpointing}, {rows} rows is refused or unknown")


def foresight_of(made: Path, way: str, buffers: Path, options: Any) -> Foresight:
    """What is foretold of a model that is there, in as many processes as ``way`` needs."""
    count = PROCESSES.get(way, 2)
    stage = ck.Finetune(
        processes=count,
        batch_size=count * options.rows,
        context_length=options.context_length,
        precision=options.precision,
        strategy="deepspeed" if "zero" in way else "auto",
        deepspeed_config=str(buffers) if "zero" in way else None,
    )
    data = ck.DataSpec(source=str(made / TEXT))
    recipe = ck.Recipe(model=str(made / MODEL), stages=(stage,), data=data, device=options.device)
    where = here(recipe)
    if way == "hsdp":  # as if its copies lay on two machines
        where = replace(where, gpus=where.gpus // 2, nodes=2)
    return ck.foresee(recipe, where)


def told(values: dict[str, Any]) -> None:
    """Add up what there is to say of all combinations, and say it."""
    errors = [abs(found["relative_error"]) for found in values.values()]
    values["largest error"] = max(errors)
    values["within 10%"] = f"{sum(error <= 0.1 for error in errors)} of {len(errors)}"
    print(f"largest error {max(errors):.1%}; within 10%: {values['within 10%']}")


def main() -> None:
    """Try every combination asked for and append a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="256x4:none,384x5:full", help="width x layers:what is recomputed")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4, help="of one pass of one process")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        buffers = Path(place) / "ds_config.json"
        buffers.write_text(json.dumps({"zero_optimization": SMALL}))
        for shape in options.shapes.split(","):
            size, recompute = shape.split(":")
            width, layers = map(int, size.split("x"))
            made = Path(place) / size
            sizes = {"vocabulary": options.vocabulary, "context_length": options.context_length}
            write_random_llama(made, rows=64, width=width, layers=layers, heads=width // 64, **sizes)
            for way in options.ways.split(","):
                foresight = foresight_of(made, way, buffers, options)
                found = of_way(foresight, way, recompute, options.rows)
                values[f"{size} {way} {recompute}"] = found.to_json()
                print(size, found, flush=True)
    told(values)
    if not options.no_record:
        asked = {n: v for n, v in vars(options).items() if n != "no_record"}
        print(append_record("foresight", values, subject=json.dumps(asked)))


if __name__ == "__main__":
    main()
