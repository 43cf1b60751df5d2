"""How long one layer takes at batch 1 on this device, dense and with its zeros left out.

Candidates are timed in turn, A B C A B C, each on as many copies of the weight as the model's weights would
fill, up to a limit: a model that fits a cache is read from it here too, and no other.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn.functional import linear

from compresskit.kernels.limits import ZeroLayout
from compresskit.measure.record import spread

COPIES_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
SAMPLE_S = 0.002  # of calls to the dense layer in one sample, so that the clock's own time is nothing
SAMPLES = 15
LEAST_SAMPLES = 5
BUDGET_S = 3.0  # after which no further samples than the least are taken
REFUSALS = (RuntimeError, NotImplementedError, ValueError)

Layer = Callable[[Tensor], Tensor]
"""Input (1, I) -> output (1, O)."""
Kernel = Callable[[Tensor, ZeroLayout], Layer | None]
"""How a layer is made of a weight (O, I); None where the weight is not for it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one layer at batch 1.

    Attributes:
        kernel: the fastest of :data:`KERNELS` that took the weight; empty where none did.
        dense_ms: first quartile, median and third quartile of the dense layer.
        sparse_ms: the same of ``kernel``; None without one.
        notes: why a kernel was left out, in full sentences.
    """

    kernel: str
    dense_ms: tuple[float, float, float]
    sparse_ms: tuple[float, float, float] | None
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Dense over sparse: 2.0 is twice as fast; 1.0 where no kernel took the weight."""
        return self.dense_ms[1] / self.sparse_ms[1] if self.sparse_ms else 1.0


def csr(weight_OI: Tensor, zeros: ZeroLayout) -> Layer | None:
    """torch's compressed rows; on a CPU they are multiplied in float32 alone."""
    wide = weight_OI.float() if weight_OI.device.type == "cpu" else weight_OI
    packed = wide.to_sparse_csr()
    return lambda x: linear(x.to(packed.dtype), packed)


def bsr(weight_OI: Tensor, zeros: ZeroLayout) -> Layer | None:
    """torch's compressed rows of square blocks, which have to divide the weight."""
    if (
        zeros.block is None
        or len({*zeros.block}) > 1
        or any(size % zeros.block[0] for size in weight_OI.shape)
    ):
        return None
    wide = weight_OI.float() if weight_OI.device.type == "cpu" else weight_OI
    packed = wide.to_sparse_bsr(zeros.block)
    return lambda x: linear(x.to(packed.dtype), packed)


def semi_structured(weight_OI: Tensor, zeros: ZeroLayout) -> Layer | None:
    """torch's 2:4 for sparse tensor cores."""
    if weight_OI.device.type != "cuda" or zeros.group not in ((2, 4), (1, 4), (1, 2)):
        return None
    packed = torch.sparse.to_sparse_semi_structured(weight_OI)
    return lambda x: linear(x, packed)


KERNELS: dict[str, Kernel] = {
    "CSR": csr,
    "BSR": bsr,
    "2:4": semi_structured,
}
"""What zeros can be left out with here, by name."""


def time_layer(weight_OI: Tensor, zeros: ZeroLayout, *, model_bytes: int) -> Timing:
    """Time ``weight_OI`` dense and by every kernel that takes it.

    Args:
        weight_OI: in the dtype and on the device to compute with; not modified.
        zeros: how its zeros lie.
        model_bytes: of all linear weights of the model, which are read between two readings of this one.

    Returns:
        The times; what a kernel refused, or computed wrongly, stands in the notes.
    """
    device = weight_OI.device
    copies = max(1, min(model_bytes, COPIES_BYTES[device.type]) // (weight_OI.numel() * weight_OI.itemsize))
    x = torch.randn(1, weight_OI.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(device, weight_OI.dtype)
    with torch.inference_mode():
        layers, notes = {"": [_dense(weight_OI.clone()) for _ in range(copies)]}, []
        for name, make in KERNELS.items():
            made, note = _packed(make, weight_OI, zeros, copies)
            if made and not note:
                note = _wrong(made[0](x), linear(x, weight_OI))
            if note:
                notes.append(f"{name} is left out: {note}")
            elif made:
                layers[name] = made
        taken = _samples(list(layers.values()), x)
    times = {name: spread(ms) for name, ms in zip(layers, taken, strict=True)}
    dense_ms = times.pop("")
    best = min(times, key=lambda name: times[name][1], default="")
    return Timing(best, dense_ms, times.get(best), tuple(notes))


def _packed(make: Kernel, weight_OI: Tensor, zeros: ZeroLayout, copies: int) -> tuple[list[Layer], str]:
    """The layer so many times, or why there is none; neither where the weight is not for it."""
    made: list[Layer] = []
    with warnings.catch_warnings():
        # torch says of its sparse tensors that they are young.
        warnings.simplefilter("ignore", UserWarning)
        try:
            while len(made) < copies and (layer := make(weight_OI, zeros)) is not None:
                made.append(layer)
            if made:
                made[0](weight_OI[:1])
        except REFUSALS as error:
            return [], str(error).splitlines()[0]
    return made, ""


def _dense(weight_OI: Tensor) -> Layer:
    return lambda x: linear(x, weight_OI)


def _wrong(got: Tensor, expected: Tensor) -> str:
    """What is wrong with an output; empty if it is the dense layer's up to rounding."""
    tolerance = 32 * torch.finfo(expected.dtype).eps * float(expected.float().abs().max())
    error = float((got.float() - expected.float()).abs().max())
    return "" if error <= tolerance else f"its output is off by {error:.1e}"


def _samples(candidates: Sequence[Sequence[Layer]], x: Tensor) -> list[list[float]]:
    """Milliseconds of one call, sampled in turn; every candidate goes round its copies."""
    turns: list[Iterator[Layer]] = [cycle(copies) for copies in candidates]
    for turn, copies in zip(turns, candidates, strict=True):
        _seconds(turn, x, len(copies))  # warm-up
    once = _seconds(turns[0], x, len(candidates[0])) / len(candidates[0])
    calls = max(len(candidates[0]), round(SAMPLE_S / max(once, 1e-9)))
    taken: list[list[float]] = [[] for _ in candidates]
    began = time.perf_counter()
    for sample in range(SAMPLES):
        if sample >= LEAST_SAMPLES and time.perf_counter() - began > BUDGET_S:
            break
        for turn, ms in zip(turns, taken, strict=True):
            ms.append(_seconds(turn, x, calls) * 1e3 / calls)
    return taken


def _seconds(turn: Iterator[Layer], x: Tensor, calls: int) -> float:
    """How long ``calls`` calls take, launches included."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    began = time.perf_counter()
    for layer in islice(turn, calls):
        layer(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began
