"""The demo's chain under each engine: perplexity as in one process, every zero kept.

    python -m benchmarks.run chain_engines

Prunes the bundled model to 60% zeros with Wanda, distils from the model before, quantises to w8a16, as
`compresskit demo` does, but with a third of its steps; the stage that trains runs on the engine in
question, in two or four processes. Perplexity is that of the report. A zero of the first stage counts as
kept where the integer in the last stage's file is 0; a group is broken where it has fewer zeros than the
pattern says. Ends with an error where perplexity is more than 1% from one process's, the manifest names
another engine, or a zero or a group was lost; the record is written all the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compresskit as ck
from benchmarks.run import RESULTS, append_record
from compresskit.cli.demo import DOCUMENTS, STEPS, chain
from compresskit.modeling import open_model
from compresskit.modeling.packed import unpacked
from compresskit.sparse.pattern import parse_pattern

ONE = "one process"
ENGINES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ONE: ("single", {}),
    "DDP": ("ddp", {"processes": 2, "strategy": "ddp"}),
    "FSDP2": ("fsdp", {"processes": 2, "strategy": "fsdp"}),
    "ZeRO-2": ("deepspeed ZeRO-2", {"processes": 2, "strategy": "deepspeed", "zero_stage": 2}),
    "ZeRO-3": ("deepspeed ZeRO-3", {"processes": 2, "strategy": "deepspeed", "zero_stage": 3}),
    "TP": ("tp 2", {"processes": 2, "strategy": "tp", "tensor_parallel": 2}),
    "PP x DP": ("pipeline 2 x 1f1b, 2 side by side", {"processes": 4, "pipeline_stages": 2}),
    "HSDP": ("fsdp 2 x 2", {"processes": 4, "strategy": "fsdp", "replicas": 2}),
}
"""Name -> what the manifest has to call it, and the fields of the stage that trains."""
TOLERANCE = 0.01
"""Of perplexity, relative to one process."""
NOTE = "Engines were not timed against each other: seconds are no measure of their speed."


def arguments() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description="The demo's chain under every engine.")
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES])
    parser.add_argument("--steps", type=int, default=20, help=f"of distillation; the demo's are {STEPS}")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="that perplexity is measured on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def ran(fields: Mapping[str, Any], steps: int, documents: int) -> dict[str, Any]:
    """What the chain leaves with ``fields`` for the stage that trains."""
    recipe, begun = chain(steps, checkpoint_every=0, **fields), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        artifact = ck.run(recipe, out, keep_stages=True, measures=("quality",), documents=documents)
        seconds = time.perf_counter() - begun
        stages = artifact.manifest["stages"]
        (trained,) = (s["result"]["metrics"] for s in stages if "engine" in s["result"]["metrics"])
        pruned, pattern = out / "stages" / stages[0]["name"], recipe.stages[0].pattern
        return {
            **{name: of_stages(out, name) for name in ("perplexity", "bits_per_byte")},
            "engine": trained["engine"],
            "processes": trained["processes"],
            **zeros_kept(pruned, out, pattern),
            "seconds": seconds,
        }


def of_stages(out: Path, name: str) -> dict[str, float]:
    """Stage -> its figure ``name`` in the report."""
    stages = (step for step in json.loads(ck.report(out).json())[0]["steps"])
    return {step["name"]: step["figures"][name] for step in stages}


def zeros_kept(pruned: Path, packed: Path, pattern: str) -> dict[str, int]:
    """How many zeros of ``pruned`` are integers 0 in ``packed``, and how many groups have too few of them."""
    before, after, form = open_model(pruned), unpacked(open_model(packed)), parse_pattern(pattern)
    found = {"layers": 0, "zeros": 0, "zeros_kept": 0, "broken_groups": 0}
    for layer, linear in before.anatomy.linears.items():
        if linear.block is None:
            continue
        grid = after.grid(layer)
        if grid is None or grid.zero_point_OG is not None:
            raise SystemExit(f"{layer}: no integers whose zero is 0")
        zero_OI, now_OI = before.weight_OI(layer) == 0, grid.quantize(after.weight_OI(layer)) == 0
        found["layers"] += 1
        found["zeros"] += int(zero_OI.sum())
        found["zeros_kept"] += int((zero_OI & now_OI).sum())
        found["broken_groups"] += len(form.missing(now_OI))
    return found


def compared(values: Mapping[str, dict[str, Any]]) -> list[str]:
    """Add to each run how far it is from one process; sentences about what is not as it should be."""
    last = {name: [*found["perplexity"].values()][-1] for name, found in values.items()}
    faults = []
    for name, found in values.items():
        found["difference_fraction"] = abs(last[name] / last[ONE] - 1)
        asked, _ = ENGINES[name]
        if found["engine"] != asked:
            faults.append(f"{name}: {asked} was asked for, {found['engine']} ran")
        if not found["difference_fraction"] <= TOLERANCE:
            faults.append(f"{name}: perplexity {last[name]:.4f}, in one process {last[ONE]:.4f}")
        if found["zeros_kept"] < found["zeros"] or found["broken_groups"] or not found["zeros"]:
            kept = f"{found['zeros_kept']:,} of {found['zeros']:,} zeros are left"
            faults.append(f"{name}: {kept}, {found['broken_groups']} groups are broken")
    return faults


def main() -> None:
    """Run the chain under each engine and append a record."""
    options = arguments().parse_args()
    values: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((ONE, *options.engines)):
        _, fields = ENGINES[name]
        values[name] = ran(fields, options.steps, options.documents)
        print(name, json.dumps(values[name]), flush=True)
    faults = compared(values)
    settings = {"steps": options.steps, "steps_of_the_demo": STEPS, "documents": options.documents}
    path = append_record(
        "chain-engines",
        values,
        subject="compresskit demo",
        settings=settings,
        notes=(NOTE,),
        results=options.results,
    )
    print(path)
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
