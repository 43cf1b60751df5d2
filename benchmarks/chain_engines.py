"""One chain of four stages under one process, FSDP2 and ZeRO-3: what stages cost, and which zeros are left.

    python -m benchmarks.run chain_engines --model DIR --train FILE --evaluate FILE

Prunes to a pattern with Wanda, trains LoRA on weights frozen in NF4 and merges, distils from the dense model,
quantises to w8a8; the two stages that train run on the engine in question, in two processes or in one. Bits
per byte after every stage. A zero of the first stage counts as kept where the integer in the last stage's
file is 0; a group is broken where it has fewer zeros than the pattern says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

import compresskit as ck
from benchmarks.run import RESULTS, append_record
from compresskit.modeling import open_model
from compresskit.sparse.pattern import parse_pattern

ENGINES: dict[str, dict[str, Any]] = {
    "one process": {},
    "fsdp, 2 processes": {"strategy": "fsdp", "processes": 2},
    "ZeRO-3, 2 processes": {"strategy": "deepspeed", "zero_stage": 3, "processes": 2},
}


def arguments() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description="A chain of four stages under several engines.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=60, help="of each stage that trains")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def recipe_of(options: argparse.Namespace, engine: dict[str, Any]) -> ck.Recipe:
    """The chain, with ``engine`` for its two stages that train."""
    fields = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "checkpoint_every": 0,
        **engine,
    }
    return ck.Recipe(
        model=str(options.model),
        data=ck.DataSpec(source=options.train),
        evaluation=ck.DataSpec(source=options.evaluate),
        stages=(
            ck.Prune("wanda", pattern=options.pattern),
            ck.Qlora(base="nf4", finish="merge", rank=16, learning_rate=2e-3, **fields),
            ck.Distill(learning_rate=1e-3, **fields),
            ck.Quantize("rtn", scheme="w8a8"),
        ),
    )


def zeros_kept(pruned: Path, packed: Path, pattern: str) -> dict[str, int]:
    """How many zeros of ``pruned`` are integers 0 in ``packed``, and how many groups have too few of them."""
    before, form = open_model(str(pruned)), parse_pattern(pattern)
    found = {"zeros": 0, "kept": 0, "layers": 0, "broken_layers": 0}
    files = [safe_open(path, "pt") for path in sorted(packed.glob("*.safetensors"))]
    integers = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    for layer, linear in before.anatomy.linears.items():
        if linear.block is None:
            continue
        zero_OI = before.weight_OI(layer) == 0
        now_OI = integers[f"{layer}.weight"].get_tensor(f"{layer}.weight")
        if now_OI.is_floating_point():
            raise SystemExit(f"{layer} is not packed")
        found["zeros"] += int(zero_OI.sum())
        found["kept"] += int((zero_OI & (now_OI == 0)).sum())
        found["layers"] += 1
        found["broken_layers"] += bool(form.missing(now_OI == 0))
    return found


def main() -> None:
    """Run the chain under each engine and append a record."""
    options = arguments().parse_args()
    values: dict[str, Any] = {}
    for name, engine in ENGINES.items():
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            artifact = ck.run(
                recipe_of(options, engine),
                out,
                keep_stages=True,
                measures=("quality",),
                documents=options.documents,
            )
            stages = artifact.manifest["stages"]
            bits = {}
            for path in sorted((out / "records").glob("[0-9]*.json")):
                if "." not in path.stem:
                    quality = next(r for r in json.loads(path.read_text()) if r["kind"] == "quality")
                    bits[path.stem] = quality["values"]["bits_per_byte"]
            trained = [s["result"]["metrics"] for s in stages if "engine" in s["result"]["metrics"]]
            values[name] = {
                "bits_per_byte": bits,
                "engines": [metrics["engine"] for metrics in trained],
                "processes": [metrics["processes"] for metrics in trained],
                **zeros_kept(out / "stages" / "1-prune", out, options.pattern),
            }
            print(name, json.dumps(values[name]), flush=True)
    settings = {
        "model": options.model.name,
        "pattern": options.pattern,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "documents": options.documents,
    }
    print(append_record("chain-engines", values, subject=json.dumps(settings), results=options.results))


if __name__ == "__main__":
    main()
