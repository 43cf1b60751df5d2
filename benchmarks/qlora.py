"""What adapters on a frozen model learn, and what they take, against fine-tuning every weight.

    python -m benchmarks.qlora --data FILE [--model DIR] [--chain] [--merges]

From the same model on the same rows, every run in a process of its own: QLoRA (NF4, LoRA on every linear
layer, merged) and ``finetune``. Nats per supervised token on rows held out by a hash of their documents,
before and after; peak resident memory beyond what the process had when everything was imported. ``--chain``
prunes first and counts what of the zeros is left; ``--merges`` folds the same adapter into the weights as
they were trained and into the unrounded ones. With ``--steps 2`` and a large model it is about memory alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.run import append_record
from compresskit.assets import teacher_path

STILL = {"steps": 1, "learning_rate": 1e-12, "base": "none", "finish": "adapter"}
"""Fields of a stage ``qlora`` that changes nothing, and evaluates."""


def child(job: dict[str, Any]) -> None:
    """One run; prints what it came to as JSON on its last line."""
    import compresskit as ck
    from compresskit import api
    from compresskit.training.adapters import bits
    from compresskit.training.adapters.attach import peft_at_work

    bits.bitsandbytes()
    with peft_at_work():
        import peft  # noqa: F401
    before = psutil.Process().memory_info().rss
    kinds: dict[str, Any] = {"qlora": ck.Qlora, "finetune": ck.Finetune, "prune": ck.Prune}
    stages = tuple(kinds[kind](**fields) for kind, fields in job["stages"])
    recipe = ck.Recipe(model=job["model"], data=ck.DataSpec(source=job["data"]), stages=stages)
    artifact = api.run(recipe, job["out"], measures=())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    last = artifact.manifest["stages"][-1]
    metrics = last["result"]["metrics"]
    found = {name: metrics.get(name) for name in ("first_loss", "final_loss", "validation_loss")}
    found |= {"peak_bytes": peak, "peak_beyond_imports_bytes": peak - before}
    found |= {"trained_parameters": metrics.get("trained_parameters"), "checks": last["checks"]}
    found["memory_forecast_bytes"] = api.plan(recipe).stages[-1].forecast.memory_bytes
    print(json.dumps(found))


def outcome(model: Path, data: str, out: Path, *stages: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """What such a chain of stages comes to, in a fresh process."""
    job = {"model": str(model), "data": data, "out": str(out), "stages": stages}
    command = [sys.executable, "-m", "benchmarks.qlora", "--child", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(out.name, found, flush=True)
    return found


def unrounded(model: Path, merged: Path, out: Path) -> None:
    """The same adapter merged into the weights of ``model`` as they were before rounding."""
    from compresskit.modeling import open_model
    from compresskit.targets import select
    from compresskit.training.adapters.bits import rounded
    from compresskit.training.write import write_checkpoint

    source, made = open_model(model), open_model(merged)
    tensors = {name: made.tensor(name) for name in made.names()}
    for layer in select(source.anatomy):
        weight_OI = source.weight_OI(layer).float()
        name = f"{layer}.weight"
        tensors[name] = tensors[name].float() + weight_OI - rounded(weight_OI, "nf4")
    out.mkdir()
    write_checkpoint(source, out, tensors)


def main() -> None:
    """Run it for one model and one text and append a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=teacher_path())
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--learning-rates", default="5e-3,5e-4", help="of QLoRA and of fine-tuning")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--merges", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    rows = {"batch_size": options.batch_size, "context_length": options.context_length}
    fields = rows | {"checkpoint_every": 0}
    rates = [float(text) for text in options.learning_rates.split(",")]
    adapters, whole = (fields | {"steps": options.steps, "learning_rate": rate} for rate in rates)
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def run(label: str, model: Path, *stages: tuple[str, dict[str, Any]]) -> None:
            values[label] = outcome(model, options.data, place / label, *stages)

        # First, since it also fills the token cache, which takes memory of its own.
        run("before", options.model, ("qlora", fields | STILL))
        run("qlora", options.model, ("qlora", adapters))
        run("finetune", options.model, ("finetune", whole))
        if options.chain:
            prune = ("prune", {"method": "wanda", "pattern": "2:4", "samples": 32})
            run("pruned", options.model, prune, ("qlora", fields | STILL))
            run("pruned-qlora", options.model, prune, ("qlora", adapters))
        if options.merges:
            run("merged-into-trained", place / "qlora", ("qlora", fields | STILL))
            unrounded(options.model, place / "qlora", place / "unrounded")
            run("merged-into-original", place / "unrounded", ("qlora", fields | STILL))
    settings = {**rows, "steps": options.steps, "rates": rates, "data": Path(options.data).name}
    subject = json.dumps({"model": options.model.name, **settings})
    print(append_record("qlora", values, subject=subject))


if __name__ == "__main__":
    main()
