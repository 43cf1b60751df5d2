"""Checks and times every packed layout's kernels on one NVIDIA GPU, against the best dense product.

    python -m benchmarks.run kernels.gpu
    python -m benchmarks.run kernels.gpu --only fragment gap --budget-s 120

Each family runs in a process of its own, so that a kernel that fails, or takes the GPU's context down with
it, loses no other's figures; what is not done when the budget ends is left out, and said. Every product is
first compared with the float64 one on fresh random numbers, into memory that held NaN. Times are of one call
within a CUDA graph over so many copies of the weight that they take 512 MB and more: no cache answers. The
dense side is the fastest of cuBLAS, cuBLASLt and torch's matrix-vector product, under the same conditions.
``byte_fraction`` is the time that a copy of as many bytes as the call must read and write would take, over
the time it took.

To look for races and reads past an end: ``compute-sanitizer --tool memcheck python -m benchmarks.run
kernels.gpu --child fragment --quick``, and with ``--tool racecheck``, ``synccheck`` and ``initcheck``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compresskit.kernels import dispatch
from compresskit.kernels.bitmap import Bitmap, pack_bits
from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.compile import architecture
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Case

COLD_BYTES = 512 << 20
REPLAYS = 15
SHAPES = ((4096, 4096), (11008, 4096), (14336, 4096), (28672, 8192))
MOST_ERROR = 1e-2
"""Of bf16 products, relative to the float64 one, as norms."""
RATES = ("popc", "prmt", "lds_u16", "shfl", "imad", "shf")
ROUNDS, CHAINS = 4096, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One product: ``layout`` of (outputs, inputs) with a share of zeros, times so many tokens."""

    layout: str
    outputs: int
    inputs: int
    zero_fraction: float
    tokens: int

    def __str__(self) -> str:
        zeros = f"{self.zero_fraction:.0%}" if self.layout not in ("fragment", "two_four") else "2:4"
        return f"{self.layout} {self.outputs}x{self.inputs} {zeros} batch {self.tokens}"


FAMILIES: dict[str, tuple[str, tuple[float, ...], tuple[int, ...]]] = {
    "fragment": ("fragment", (0.5,), (1, 4, 8, 16, 32, 64)),
    "gap": ("gap", (0.6, 0.7, 0.8), (1, 2)),
    "tile": ("tile", (0.5, 0.6, 0.7), (1, 4, 8, 16)),
    "prefill": ("tile", (0.5,), (64, 256, 2048)),
    "triton-bitmap": ("bitmap", (0.5, 0.7), (1, 8)),
    "triton-two-four": ("two_four", (0.5,), (1, 8)),
}
"""Family -> layout, shares of zeros, batches."""


def cells(family: str, quick: bool) -> Iterator[Cell]:
    """Of one family; ``quick`` has small shapes alone."""
    layout, fractions, batches = FAMILIES[family]
    shapes = {"prefill": SHAPES[2:3], "triton-bitmap": SHAPES[1:3], "triton-two-four": SHAPES[1:3]}.get(
        family, SHAPES
    )
    shapes = ((257, 520), (1024, 4096)) if quick else shapes
    for outputs, inputs in shapes:
        for fraction in fractions:
            for tokens in batches:
                yield Cell(
                    layout=layout, outputs=outputs, inputs=inputs, zero_fraction=fraction, tokens=tokens
                )


def draw(cell: Cell) -> Tensor:
    """A bf16 weight with such zeros, none of the others 0."""
    score = torch.rand(cell.outputs, cell.inputs, device="cuda")
    if cell.layout in ("fragment", "two_four"):
        keep = score.view(cell.outputs, -1, 4).argsort(-1).argsort(-1).view_as(score) < 2
    else:
        keep = score >= cell.zero_fraction
    weight = torch.randn(cell.outputs, cell.inputs, device="cuda") / cell.inputs**0.5
    weight = weight.bfloat16()
    return torch.where(keep, torch.where(weight == 0, 1, weight), 0)


def bitmap_of(weight: Tensor) -> Bitmap:
    keep = weight != 0
    return Bitmap(mask_OB=pack_bits(keep), values_K=weight[keep], in_features=weight.shape[1])


def time_ms(call: Callable[[int], object], copies: int) -> list[float]:
    """Of one of ``copies`` calls in a CUDA graph: first quartile, median and third over replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    samples = []
    for _ in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / copies)
    ordered = sorted(samples[2:])
    return [ordered[len(ordered) * i // 4] for i in (1, 2, 3)]


def poison(*shape: int) -> None:
    """Leave NaN in all memory that the allocator may hand out for such a tensor next."""
    for _ in [torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(16)]:
        pass


def relative_error(got: Tensor, x: Tensor, weight: Tensor) -> float:
    true = x.double() @ weight.double().T
    return float((got.double() - true).norm() / true.norm())


def copies_of(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = max(4, -(-COLD_BYTES // size))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def dense_ms(x: Tensor, weights: list[tuple[Tensor, ...]]) -> dict[str, list[float]]:
    """Library -> times of the dense product."""
    found = {}
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        found[library] = time_ms(lambda i: linear(x, weights[i][0]), len(weights))
    if len(x) == 1:
        found["matrix-vector"] = time_ms(lambda i: torch.mv(weights[i][0], x[0]), len(weights))
    return found


def run_cell(
    cell: Cell, weight: Tensor, packed: list[tuple[Tensor, ...]], dense: list[tuple[Tensor, ...]], rate: float
) -> dict[str, Any]:
    layout = LAYOUTS[cell.layout]()
    x = torch.randn(cell.tokens, cell.inputs, device="cuda").bfloat16()
    poison(cell.tokens, cell.outputs)
    got = layout.linear(x, packed[0], None)
    error = relative_error(got, x, weight)
    again = torch.equal(got, layout.linear(x, packed[0], None))
    if not error <= MOST_ERROR:
        raise AssertionError(f"relative error {error:.3g}, of at most {MOST_ERROR}")
    ours = time_ms(lambda i: layout.linear(x, packed[i], None), len(packed))
    theirs = dense_ms(x, dense)
    best = min(times[1] for times in theirs.values())
    moved = sum(t.numel() * t.element_size() for t in packed[0]) + x.nbytes + got.nbytes
    return {
        "ms": ours,
        "dense_ms": theirs,
        "speedup": best / ours[1],
        "byte_fraction": moved / rate * 1e3 / ours[1],
        "dense_byte_fraction": (weight.nbytes + x.nbytes + got.nbytes) / rate * 1e3 / best,
        "bytes_per_weight": sum(t.numel() * t.element_size() for t in packed[0]) / weight.numel(),
        "relative_error": error,
        "same_bits_twice": again,
        "implementation": dispatch.used().get(layout.op, ""),
    }


def run_family(family: str, quick: bool) -> None:
    """Print a line of JSON for each cell."""
    rate = copy_bytes_per_s()
    made: tuple[Any, ...] = ()
    held: Any = None
    for cell in cells(family, quick):
        said: dict[str, Any] = {"cell": str(cell), **asdict(cell)}
        try:
            why = LAYOUTS[cell.layout]().refusal(case_of(cell))
            if why:
                raise RuntimeError(f"refused: {why}")
            if held != (cell.outputs, cell.inputs, cell.zero_fraction):
                made, held = (), None
                torch.cuda.empty_cache()
                weight = draw(cell)
                packed = LAYOUTS[cell.layout]().pack(bitmap_of(weight), torch.device("cuda"))
                made = (weight, copies_of(packed), copies_of((weight,)))
                held = (cell.outputs, cell.inputs, cell.zero_fraction)
            said |= run_cell(cell, *made, rate)
        except Exception as error:  # the next cell may well run
            said["error"] = f"{type(error).__name__}: {error}"[:600]
        print(json.dumps(said), flush=True)


def case_of(cell: Cell) -> Case:
    return Case(
        out_features=cell.outputs,
        in_features=cell.inputs,
        values=torch.bfloat16,
        inputs=torch.bfloat16,
        zero_fraction=cell.zero_fraction,
        group=(2, 4) if cell.layout in ("fragment", "two_four") else None,
        device="cuda",
        tokens=cell.tokens,
    )


def copy_bytes_per_s() -> float:
    """Bytes read and written by a large copy from the GPU's memory to itself."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_ms(lambda i: target.copy_(source), 4)[1] * 1e3


def run_rates(quick: bool) -> None:
    """Print, as one line, how many lanes' operations of each kind a multiprocessor does in a cycle."""
    machine = launch.machine(torch.cuda.current_device())
    said: dict[str, Any] = {"cell": "rates", "copy_bytes_per_s": copy_bytes_per_s()}
    for kind, name in enumerate(RATES):
        try:
            out = torch.empty(machine.multiprocessors * 1024, dtype=torch.int32, device="cuda")
            cycles = torch.empty(machine.multiprocessors, dtype=torch.int32, device="cuda")
            stem = str(Path(__file__).with_name("rates"))
            for _ in range(2):
                grid = (machine.multiprocessors, 1)
                launch.start(stem, {"KIND": kind}, grid, 1024, 4096, [out, cycles, ROUNDS])
            torch.cuda.synchronize()
            said[f"{name}_lanes_per_cycle"] = 1024 * CHAINS * ROUNDS / float(cycles.double().median())
        except Exception as error:  # the others may well run
            said[f"{name}_error"] = str(error)[:300]
    print(json.dumps(said), flush=True)


def child_lines(family: str, quick: bool, seconds: float) -> list[dict[str, Any]]:
    """What a process of its own found of ``family`` before its time was over."""
    command = [sys.executable, "-m", "benchmarks.run", "kernels.gpu", "--child", family]
    command += ["--quick"] if quick else []
    lines: list[dict[str, Any]] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
        ended = "" if process.returncode == 0 else f"ended with {process.returncode}: {err[-1500:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        ended = "time was over"
    for line in out.splitlines():
        if line.startswith("{"):
            lines.append(json.loads(line))
    if ended:
        lines.append({"cell": f"{family}, the rest", "error": ended})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if "error" in line:
            rows.append(f"{line['cell']:<44} {line['error'].splitlines()[-1][:120]}")
        elif "speedup" in line:
            rows.append(
                f"{line['cell']:<44} {line['ms'][1] * 1e3:8.1f} us  {line['speedup']:5.2f}x  "
                f"{line['byte_fraction']:4.0%} of bytes (dense {line['dense_byte_fraction']:4.0%})  "
                f"error {line['relative_error']:.1e}  {line['implementation']}"
            )
        else:
            rows.append(json.dumps(line))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, "rates"], default=["rates", *FAMILIES])
    parser.add_argument("--budget-s", type=float, default=460, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see whether all runs")
    parser.add_argument(
        "--results", type=Path, help="folder of the record; where records are kept if not given"
    )
    parser.add_argument("--child", choices=[*FAMILIES, "rates"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    why = launch.unavailable()
    if why:
        sys.exit(f"no CUDA kernels can be had here: {why}")
    if options.child:
        (run_rates(options.quick) if options.child == "rates" else run_family(options.child, options.quick))
        return
    ends = time.monotonic() + options.budget_s
    lines = []
    for family in options.only:
        found = child_lines(family, options.quick, ends - time.monotonic())
        print(table(found), flush=True)
        lines += found
    print(write(lines, options), flush=True)
    print(table(lines))


def write(lines: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Append the record; where that fails, print it whole."""
    settings = {
        "cold_bytes": COLD_BYTES,
        "replays": REPLAYS,
        "quick": options.quick,
        "cuda": torch.version.cuda,
    }
    values = {line["cell"]: {k: v for k, v in line.items() if k != "cell"} for line in lines}
    try:
        from benchmarks.kernels.registers import taken
        from benchmarks.run import RESULTS, append_record

        values["registers"] = taken(architecture(torch.cuda.get_device_capability()))
        name = torch.cuda.get_device_name()
        path = append_record(
            "kernels-gpu",
            values,
            subject="packed layouts against the best dense product, bf16",
            results=options.results or RESULTS,
            settings=settings,
            device=name,
            repetitions=REPLAYS,
        )
        return str(path)
    except Exception as error:  # figures of a lent machine are not to be lost
        return f"no record: {error}\n{json.dumps(values)}"


if __name__ == "__main__":
    main()
