"""How long each layout takes to multiply by one layer on this device: in turn, from memory, by tokens.

Layouts take turns, each on as many copies of the weight as the model's weights would fill, up to a limit: a
model that fits a cache is read from it here too, and no other.

Shapes: O = outputs, I = inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from compresskit.kernels.bitmap import Bitmap, unpack
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Case, Layout, Packed

DENSE = "dense"
EXPANDED = " expanded"
"""Of a name: the packed weight is made dense for the moment of the product."""
LEFT_OUT = "is left out"
OVERHEAD_MS = 0.002
"""What it costs to ask for a layout, which a dense layer does without."""
HOPELESS = 4.0  # times slower than dense: not tried on more tokens
COPIES_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
ROUNDS, LEAST_ROUNDS = 9, 3
SAMPLE_S = 0.0005  # of products in one sample, so that the clock's own time is nothing
POINT_S = 0.25  # after which one number of tokens takes no further rounds than the least

Run = Callable[[], object]
Timer = Callable[[Mapping[str, Run], torch.device], Mapping[str, float]]
"""(name -> one product, device) -> name -> milliseconds of it."""
Times = Mapping[str, Mapping[int, float]]
"""Layout, or layout and ``EXPANDED`` -> tokens -> milliseconds; what was not tried is absent."""


def contest(
    weight: Bitmap,
    case: Case,
    points: tuple[int, ...],
    *,
    device: torch.device,
    budget_s: float,
    model_bytes: int = 0,
    expanded: bool = False,
    timer: Timer | None = None,
) -> tuple[Times, tuple[str, ...]]:
    """Time every layout that takes such a layer.

    Args:
        weight: without a fault.
        case: that it is.
        points: numbers of tokens, rising.
        device: to compute on.
        budget_s: after which no further point is begun.
        model_bytes: of all weights that are read between two readings of this one.
        expanded: whether making a packed weight dense for the moment is timed too.
        timer: None is :func:`in_turn`.

    Returns:
        The times, and sentences on what was left out.
    """
    began = time.perf_counter()
    notes: list[str] = []
    ways = _ways(weight, case, device, min(model_bytes, COPIES_BYTES.get(device.type, 0)), expanded, notes)
    times: dict[str, dict[int, float]] = {name: {} for name in ways}
    left = set(ways)
    last_s = 0.0
    for tokens in points:
        # Time grows with tokens: what would not be done in time is not begun.
        if tokens > points[0] and time.perf_counter() - began + last_s > budget_s:
            notes.append(
                f"A layer of {case.out_features}x{case.in_features} was not timed for {tokens} tokens and "
                f"more, where it is dense: its {budget_s:.3g} s were over (COMPRESSKIT_CHOICE_SECONDS)."
            )
            break
        point = time.perf_counter()
        x, there = _draw(tokens, case, device, seed=0), replace(case, tokens=tokens)
        runs = {name: _bind(ways[name], x) for name in ways if name in left and not ways[name].refusal(there)}
        with torch.inference_mode():
            for name, ms in (timer or in_turn)(runs, device).items():
                times[name][tokens] = ms
        limit_ms = HOPELESS * times[DENSE][tokens] + OVERHEAD_MS
        left -= {name for name in runs if times[name].get(tokens, 0.0) > limit_ms}
        last_s = time.perf_counter() - point
    return times, tuple(notes)


def in_turn(runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
    """The median milliseconds of each of ``runs``, sampled A B C A B C."""
    once = {name: _seconds(run, 1, device) for name, run in runs.items()}
    once = {name: min(s, _seconds(runs[name], 1, device)) for name, s in once.items()}
    calls = {name: max(1, min(50, round(SAMPLE_S / max(s, 1e-7)))) for name, s in once.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - began > POINT_S:
            break
        for name, run in runs.items():
            taken[name].append(_seconds(run, calls[name], device) / calls[name])
    return {name: median(seconds) * 1e3 for name, seconds in taken.items()}


def _seconds(run: Run, calls: int, device: torch.device) -> float:
    """How long ``calls`` calls take, launches included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def expand(layout: Layout, packed: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (O, I) of what ``layout`` packed, on its device; by its own op if it has one."""
    name = layout.op.removesuffix("_linear") + "_expand"
    op = getattr(torch.ops.compresskit, name, None)
    if op is not None:
        dense: Tensor = op(*packed, in_features, dtype)
        return dense
    return unpack(layout.unpack(packed, in_features), dtype).to(packed[0].device)


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to multiply.

    Attributes:
        copies: of the weight, round and round: each is read from memory when its turn comes again.
        product: of one of them and the inputs.
        refusal: why it does not take a case.
    """

    copies: Iterator[Packed]
    product: Callable[[Packed, Tensor], Tensor]
    refusal: Callable[[Case], str]


def _ways(
    weight: Bitmap, case: Case, device: torch.device, limit: int, expanded: bool, notes: list[str]
) -> dict[str, _Way]:
    """Dense and every layout that takes the layer and computes what dense does, each on ``limit`` bytes."""
    dense_OI = unpack(weight, case.inputs).to(device)
    made = {DENSE: _Way(_copies((dense_OI,), limit), _dense_product, lambda _: "")}
    x = _draw(2, case, device, seed=1)
    expected = _dense_product((dense_OI,), x)
    for name in LAYOUTS:
        if name == DENSE:
            continue
        layout = LAYOUTS[name]()
        if layout.refusal(case):
            continue
        try:
            packed = layout.pack(weight, device)
            error = _error(layout.linear(x, packed, None), expected)
        except Exception as problem:  # whatever a compiler, a driver or a kernel raises: dense is there
            notes.append(f"Layout {name} {LEFT_OUT}: {type(problem).__name__}: {_line(problem)}")
            continue
        if error:
            notes.append(f"Layout {name} {LEFT_OUT}: its output is off by {error:.1e}.")
            continue
        made[name] = _Way(_copies(packed, limit), _linear_of(layout), layout.refusal)
        if expanded:  # it goes on where the other way stopped, with the copy that was read longest ago
            product = _expanded_of(layout, case.in_features)
            made[name + EXPANDED] = _Way(made[name].copies, product, lambda _: "")
    return made


def _draw(tokens: int, case: Case, device: torch.device, seed: int) -> Tensor:
    """Inputs, made on the CPU whatever torch's default device is."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(tokens, case.in_features, generator=generator, device="cpu")
    return x.to(device, case.inputs)


def _copies(packed: Packed, limit: int) -> Iterator[Packed]:
    """``packed`` and as many copies of it as fill ``limit`` bytes, for ever."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed)
    count = max(1, -(-limit // max(1, size)))
    return cycle([packed if not i else tuple(t.clone() for t in packed) for i in range(count)])


def _dense_product(packed: Packed, x: Tensor) -> Tensor:
    return linear(x, packed[0])


def _linear_of(layout: Layout) -> Callable[[Packed, Tensor], Tensor]:
    return lambda packed, x: layout.linear(x, packed, None)


def _expanded_of(layout: Layout, in_features: int) -> Callable[[Packed, Tensor], Tensor]:
    return lambda packed, x: linear(x, expand(layout, packed, in_features, x.dtype))


def _bind(way: _Way, x: Tensor) -> Run:
    """One product after another, each with the next copy of the weight."""
    return lambda: way.product(next(way.copies), x)


def _error(got: Tensor, expected: Tensor) -> float:
    """How far an output is from the dense layer's, if by more than rounding; else 0."""
    if not expected.numel():
        return 0.0
    tolerance = 32 * torch.finfo(expected.dtype).eps * float(expected.float().abs().max())
    error = float((got.float() - expected.float()).abs().max())
    return 0.0 if error <= tolerance else error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
