"""What the trainer costs over a plain loop, and how well two ranks share work: times of optimiser steps.

    python -m benchmarks.run training --overhead
    python -m benchmarks.run training --scaling

``--overhead``: a random Llama of 110 million parameters, fp32, the same rows in the same order, one process;
the loop is written by hand over transformers' own loss, with fused AdamW and clipped gradients.
``--scaling``: a smaller one, one thread a rank, as many rows a rank: one rank against two, of our trainer
under DDP, FSDP2 and ZeRO-2, and of the plain loop under DDP. Two runs side by side that know nothing of each
other show what the machine's memory and cores leave of 1. Fresh processes in turn, ``--rounds`` times over;
the first two steps of each are not counted.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.peers.call import HERE, run_jobs
from benchmarks.random_llama import VOCABULARY, write_model
from benchmarks.run import RESULTS, append_record
from compresskit.measure.record import spread

WARMUP = 2
OURS, PLAIN = "compresskit_train.py", "plain_train.py"
LAUNCH = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
Side = tuple[str, int, Mapping[str, Any]]
"""Script, ranks, fields."""
OVERHEAD: Mapping[str, Side] = {"compresskit": (OURS, 1, {}), "plain": (PLAIN, 1, {})}
SCALING: Mapping[str, Side] = {
    "one": (OURS, 1, {}),
    "ddp": (OURS, 2, {"strategy": "ddp"}),
    "fsdp": (OURS, 2, {"strategy": "fsdp"}),
    "zero2": (OURS, 2, {"strategy": "deepspeed", "zero_stage": 2}),
    "plain_one": (PLAIN, 1, {}),
    "plain_ddp": (PLAIN, 2, {}),
}
APART = "apart"
"""Two of ``one`` at once."""


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def steps_of(place: Path, side: Side, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, the losses, and the versions of one fresh run."""
    script, ranks, fields = side
    place.mkdir(exist_ok=True)
    task = {"model": str(model), "threads": options.threads, "fields": dict(fields)}
    task["ids"] = str(model.parent / f"ids-{ranks}.safetensors")
    launch = (*LAUNCH, "--master-port", str(free_port())) if ranks > 1 else ()
    command = [sys.executable, *launch, str(HERE / script)]
    answer = run_jobs(command, task, place).answer
    return {**answer, "step_s": median(answer["seconds"][WARMUP:])}


def measured(
    sides: Mapping[str, Side], options: argparse.Namespace, *, apart: bool
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Each round of each side, and the parameters of the model."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place, model = Path(scratch), Path(scratch) / "model"
        shape = {"width": options.width, "layers": options.layers, "heads": options.width // 64}
        parameters = write_model(model, vocabulary=options.vocabulary, seed=0, **shape)
        for ranks in (1, 2):
            ids = torch.randint(
                options.vocabulary,
                (options.steps, ranks * options.rows, options.context_length),
                generator=torch.Generator().manual_seed(0),
                dtype=torch.int32,
            )
            save_file({"input_ids": ids}, place / f"ids-{ranks}.safetensors")
        for _ in range(options.rounds):
            for name, side in sides.items():
                runs.setdefault(name, []).append(steps_of(place / name, side, model, options))
                print(name, runs[name][-1]["step_s"], flush=True)
            if apart:
                with ThreadPoolExecutor() as pool:
                    both = [
                        pool.submit(steps_of, place / f"{APART}-{i}", sides["one"], model, options)
                        for i in (0, 1)
                    ]
                slower = max((b.result() for b in both), key=lambda run: run["step_s"])
                runs.setdefault(APART, []).append(slower)
                print(APART, slower["step_s"], flush=True)
    return runs, parameters


def require_same_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> None:
    """Times of sides that do other work are worth nothing.

    Raises:
        SystemExit: a loss differs by more than one in ten thousand.
    """
    first = runs[names[0]][0]["losses"]
    for name in names[1:]:
        losses = runs[name][0]["losses"]
        if any(abs(a - b) > 1e-4 * abs(a) for a, b in zip(first, losses, strict=True)):
            raise SystemExit(f"{name} does other work than {names[0]}: losses {losses} and {first}")


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="The trainer's overhead, and how two ranks share work.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--overhead", action="store_true")
    what.add_argument("--scaling", action="store_true")
    parser.add_argument("--width", type=int, help="[768, or 384 with --scaling]")
    parser.add_argument("--layers", type=int, help="[12, or 8 with --scaling]")
    parser.add_argument("--vocabulary", type=int, help=f"[{VOCABULARY}, or 8000 with --scaling]")
    parser.add_argument("--rows", type=int, help="of a rank and step [2, or 8 with --scaling]")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.threads = 1 if options.scaling else 2
    sizes = (384, 8, 8000, 8) if options.scaling else (768, 12, VOCABULARY, 2)
    for name, size in zip(("width", "layers", "vocabulary", "rows"), sizes, strict=True):
        setattr(options, name, getattr(options, name) or size)
    return options


def main() -> None:
    """Measure in turn and append a record."""
    options = parsed()
    sides = SCALING if options.scaling else OVERHEAD
    runs, parameters = measured(sides, options, apart=options.scaling)
    if options.scaling:
        require_same_losses(runs, ("one", "plain_one"))
        require_same_losses(runs, ("ddp", "fsdp", "zero2", "plain_ddp"))
    else:
        require_same_losses(runs, tuple(OVERHEAD))
    three = {f"{name}_step_s": spread([run["step_s"] for run in found]) for name, found in runs.items()}
    values: dict[str, Any] = {name: middle for name, (_, middle, _) in three.items()}
    values["parameters"] = parameters
    if options.scaling:
        alone = {name: "plain_one" if name.startswith("plain") else "one" for name in runs}
        pairs = {name: one for name, one in alone.items() if name != one}
        values |= {f"{n}_efficiency": values[f"{o}_step_s"] / values[f"{n}_step_s"] for n, o in pairs.items()}
    else:
        values["overhead"] = values["compresskit_step_s"] / values["plain_step_s"] - 1
    for name, value in values.items():
        print(f"{name}: {value:,.4g}")
    names = ("width", "layers", "vocabulary", "rows", "context_length", "steps")
    print(
        append_record(
            "weak-scaling" if options.scaling else "trainer-overhead",
            values,
            subject=f"a random Llama of {parameters / 1e6:.0f}M parameters, fp32",
            results=options.results,
            quartiles=three,
            settings={name: getattr(options, name) for name in names},
            threads=options.threads,
            repetitions=options.rounds,
            versions=next(iter(runs.values()))[0]["versions"],
        )
    )


if __name__ == "__main__":
    main()
