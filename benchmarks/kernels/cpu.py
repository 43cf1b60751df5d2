"""Packed weights on the CPU against dense ones: ours, torch's, and those of torch's other types.

    python -m benchmarks.run kernels.cpu
    python -m benchmarks.run kernels.cpu --shapes 4096x4096 --zeros 0.5 2:4 --batches 1 --repetitions 5

Weights are cold: every candidate goes round copies that take more than any cache holds, and candidates take
turns. ``ratio`` is the time of our own dense bf16 product, a loop that does nothing but read the weight, over
that of the candidate; for batches above one it is of torch's bf16 product. ``limit`` is the most that the
bytes of the weight allow in a batch of one (``compresskit.kernels.limits``); of larger ones they are none.
CSR is timed a few times alone: it takes long.
"""

from __future__ import annotations

import argparse
import ctypes
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.run import RESULTS, append_record
from compresskit.kernels import dispatch, limits
from compresskit.kernels.bitmap import Bitmap, pack
from compresskit.kernels.cpu import build, library
from compresskit.kernels.packed import LAYOUTS
from compresskit.measure.kernels import table
from compresskit.measure.record import spread
from compresskit.timing import default_threads

COLD_BYTES = 128 << 20
SHAPES = ("57344x4096", "4096x4096", "11008x4096", "4096x11008", "14336x4096")
ZEROS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4")
SLOW_REPETITIONS = 3
OWN, TORCH, INT8, CSR = "own dense bf16", "torch bf16", "torch int8", "torch CSR fp32"
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
MOST_ERROR = 0.02
"""Of any candidate, relative to the largest output; a candidate that errs more has no time."""


@dataclass(slots=True)
class Candidate:
    """One way to multiply.

    Attributes:
        name: of it.
        nbytes: of one copy of its weight.
        make: a function that multiplies by a new copy of the weight.
        slow: whether it is timed a few times alone.
        ms: of every call that counted.
    """

    name: str
    nbytes: int
    make: Callable[[], Callable[[], Tensor]]
    slow: bool = False
    ms: list[float] = field(default_factory=list)


def draw(outputs: int, inputs: int, zeros: str, seed: int) -> Tensor:
    """A weight in fp32 that int8 and bf16 can say; none of the kept ones is zero."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(1, 128, (outputs, inputs), generator=random, dtype=torch.int8)
    score = torch.rand(outputs, inputs, generator=random)
    if zeros == "2:4":
        keep = torch.ones_like(score, dtype=torch.bool).view(outputs, -1, 4)
        keep.scatter_(-1, score.view(outputs, -1, 4).topk(2, dim=-1).indices, False)
        keep = keep.view(outputs, inputs)
    else:
        keep = score >= float(zeros)
    return (weight * keep).float() * torch.where(score > 0.75, -1.0, 1.0)


def packed(weight: Tensor, values: str) -> Bitmap:
    scales = torch.ones(len(weight), 1) if values == "int8" else None
    return pack(weight.to(TYPES[values]), scales)


def candidates(weight: Tensor, zeros: str, x: Tensor, options: argparse.Namespace) -> Iterator[Candidate]:
    """All of them, for inputs ``x`` in fp32."""
    narrow = x.bfloat16()
    dense = weight.bfloat16()
    if len(x) == 1 and weight.shape[1] % 256 == 0:
        yield Candidate(OWN, dense.nbytes, lambda: own_dense(dense.clone(), narrow))
    yield Candidate(TORCH, dense.nbytes, lambda: closed(linear, narrow, dense.clone()))
    yield Candidate("torch fp32", weight.nbytes, lambda: closed(linear, x, weight.clone()))
    eight, ones = weight.to(torch.int8), torch.ones(len(weight)).bfloat16()
    eighths = torch.ops.aten._weight_int8pack_mm
    yield Candidate(INT8, eight.nbytes, lambda: closed(eighths, narrow, eight.clone(), ones))
    if not options.no_csr:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says of CSR that it is young
            rows = weight.to_sparse_csr()
        nbytes = sum(t.nbytes for t in (rows.values(), rows.col_indices(), rows.crow_indices()))
        yield Candidate(CSR, nbytes, lambda: closed(linear, x, rows.clone()), slow=True)
    for name in ("bitmap", "two_four") if zeros == "2:4" else ("bitmap",):
        layout = LAYOUTS[name]()
        for values in options.values:
            tensors = layout.pack(packed(weight, values), torch.device("cpu"))
            nbytes = sum(t.nbytes for t in tensors)
            given = x if values == "fp32" else narrow
            yield Candidate(f"{name} {values}", nbytes, copies_of(layout, tensors, given))


def closed(function: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def copies_of(layout: Any, tensors: Sequence[Tensor], x: Tensor) -> Callable[[], Callable[[], Tensor]]:
    return lambda: closed(layout.linear, x, tuple(t.clone() for t in tensors), None)


def own_dense(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Our own product; see ``dense.c``."""
    flags = (*library.PATHS[library.path()], "-DVALUE_TYPE=1", f"-I{build.HERE}")
    run = build.load(str(Path(__file__).with_name("dense.c")), flags).dense
    run.argtypes, run.restype = [ctypes.POINTER(library.Job), ctypes.c_void_p], None
    outputs, inputs = weight.shape
    out, wide = torch.empty(1, outputs, dtype=torch.bfloat16), torch.empty(inputs)

    def call() -> Tensor:
        job = library.Job(
            inputs=x.data_ptr(),
            outputs=out.data_ptr(),
            values=weight.data_ptr(),
            arranged=wide.data_ptr(),
            tokens=1,
            outs=outputs,
            ins=inputs,
            words_per_row=inputs // 64,
            threads=torch.get_num_threads(),
        )
        run(ctypes.byref(job), library.parallel())
        return out

    return call


def timed(found: Sequence[Candidate], expected: Tensor, repetitions: int) -> list[str]:
    """Time all in turn; returns which of them are wrong, which are not timed."""
    rings, wrong = {}, []
    for one in found:
        copies = 1 if one.slow else max(1, -(-COLD_BYTES // one.nbytes))
        made = [one.make() for _ in range(copies)]
        error = float((made[0]().float() - expected).abs().max() / expected.abs().max())
        if error > MOST_ERROR:
            wrong.append(f"{one.name} errs by {error:.1%}")
        else:
            rings[one.name] = cycle(made)
    for turn in range(-1, repetitions):  # the first does not count
        for one in found:
            if one.name in rings and (not one.slow or turn < SLOW_REPETITIONS):
                call = next(rings[one.name])
                began = time.perf_counter()
                call()
                if turn >= 0:
                    one.ms.append((time.perf_counter() - began) * 1e3)
    return wrong


def limit_of(name: str, zeros: str, tokens: int) -> float | None:
    """The most that the bytes allow a packed weight over a dense bf16 one; None where they are no bound."""
    storage = {"bitmap": "mask", "two_four": "index"}.get(name.split()[0])
    if storage is None or tokens > 1:
        return None
    values = {"bf16": limits.BF16, "fp32": limits.FP32, "int8": limits.INT8}[name.split()[1]]
    layout = limits.ZeroLayout(
        zero_fraction=0.5 if zeros == "2:4" else float(zeros), group=(2, 4) if zeros == "2:4" else None
    )
    return limits.limit(limits.BF16, next(p for p in limits.packings(values, layout) if p.storage == storage))


def cell(shape: str, zeros: str, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each candidate."""
    outputs, inputs = map(int, shape.split("x"))
    weight = draw(outputs, inputs, zeros, seed=options.seed)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    found = list(candidates(weight, zeros, x, options))
    with torch.inference_mode():
        wrong = timed(found, linear(x, weight), options.repetitions)
    by_name = {one.name: spread(one.ms) for one in found if one.ms}
    yardstick = by_name.get(OWN, by_name[TORCH])[1]
    rows = []
    for one in found:
        quartiles, limit = by_name.get(one.name), limit_of(one.name, zeros, tokens)
        if quartiles is None:
            continue
        ratio = yardstick / quartiles[1]
        rows.append(
            {
                "shape": shape,
                "zeros": zeros,
                "tokens": tokens,
                "candidate": one.name,
                "ms": list(quartiles),
                "bytes": one.nbytes,
                "GB_per_s": one.nbytes / quartiles[1] / 1e6,
                "ratio": ratio,
                "over_torch_bf16": by_name[TORCH][1] / quartiles[1],
                "over_torch_int8": by_name[INT8][1] / quartiles[1] if INT8 in by_name else None,
                "limit": limit,
                "limit_fraction": ratio / limit if limit else None,
            }
        )
    print(table(rows), *wrong, sep="\n", flush=True)
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packed weights on the CPU against dense ones.")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--zeros", nargs="+", default=ZEROS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4, 16))
    parser.add_argument("--values", nargs="+", default=tuple(TYPES), choices=TYPES)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--no-csr", action="store_true", help="leave out what takes longest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Time every cell and append a record."""
    options = parsed()
    torch.set_num_threads(default_threads())
    dispatch.forget()
    rows = []
    for shape in options.shapes:
        for zeros in options.zeros:
            for tokens in options.batches:
                rows += cell(shape, zeros, tokens, options)
    names = ("batches", "values", "seed")
    print(
        append_record(
            "kernels-cpu",
            {"rows": rows},
            subject="packed weights against dense ones, one layer",
            results=options.results,
            settings={
                **{name: getattr(options, name) for name in names},
                "cold_bytes": COLD_BYTES,
                "instructions": library.path(),
            },
            notes=dispatch.passed_over(),
            seed=options.seed,
            repetitions=options.repetitions,
        )
    )


if __name__ == "__main__":
    main()
