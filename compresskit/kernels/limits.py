"""What zeros can be worth: bytes of a weight, dense and packed, and the speed-up that they bound. No torch.

At batch 1 each weight of a layer is read once and multiplied once, and reading takes longer: no kernel is
faster than memory brings the bytes. So the bytes of a dense weight over those of a packed one are the most
that zeros give there. The input and the output, a row each, are left out.

Bits of one weight, zeros counted, where a value has ``bits``, ``kept`` is the share that is not zero, and a
group of M keeps N:

* ``dense``: bits. Zeros are values like any other.
* ``mask``: kept x bits + 1. One bit for each weight says whether it is kept.
* ``index``, for N:M: N/M x (bits + ceil(log2 M)). Each kept weight says which of its group it is; a group
  that keeps fewer stores zeros. In 2:4 that takes two bits, as sparse tensor cores read them: 2/4 x (16 + 2)
  = 9 bits where values have 16, as many as with a mask.
* ``gap``: kept x (1 + pad) x (bits + 4). Each kept weight says how many zeros, at most 15, stand before it;
  of a longer run every sixteenth zero is stored: pad = z**16 / (1 - z**16) on average where zeros lie
  anywhere, with z = 1 - kept.
* ``block``: share of blocks that are not zero x bits + 1 / (rows x columns). One bit for each block.

All take besides the weight's part of scales, zero or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

DENSE = "dense"
GAP_BITS = 4
WIDTHS = (64, 32, 16, 8, 4)
PACKED_BY: Mapping[str, tuple[str, ...]] = {
    "transformers": (),
    "vLLM": (),
    "llama.cpp": (),
    "onnxruntime": (),
    "compresskit": ("mask",),
}
"""Runtime -> the storages of zeros that it multiplies by as they are; most know of none."""
READ_INTEGERS = ("vLLM", "llama.cpp")
"""Runtimes that multiply by quantised weights as they are; transformers unpacks them first."""


@dataclass(frozen=True, slots=True)
class Values:
    """What the value of one weight takes.

    Attributes:
        bits: of the value itself.
        scale_bits: its part of scales and zero points.
    """

    bits: float
    scale_bits: float = 0.0

    @property
    def bytes_per_weight(self) -> float:
        """Of a dense weight."""
        return (self.bits + self.scale_bits) / 8

    def __str__(self) -> str:
        return f"{self.bits:.3g}-bit"


FP32, BF16, INT8, INT4_G128 = Values(32), Values(16), Values(8), Values(4, 16 / 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroLayout:
    """How zeros lie in a weight, as far as storing them needs to know. ``str()`` is for people.

    Attributes:
        zero_fraction: of all weights, in [0, 1].
        group: (N, M) where no M consecutive inputs keep more than N.
        block: (rows, columns) of the blocks that zeros fill.
        block_fraction: of blocks that are zero.
        even: whether every row has as many zeros.
    """

    zero_fraction: float
    group: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    block_fraction: float = 0.0
    even: bool = False

    def __str__(self) -> str:
        if self.group is not None:
            return f"{self.group[0]}:{self.group[1]}"
        if self.block is not None:
            return f"blocks of {self.block[0]}x{self.block[1]}"
        if not self.zero_fraction:
            return "none"
        return "even rows" if self.even else "unstructured"


@dataclass(frozen=True, slots=True)
class Packing:
    """One way to store a weight.

    Attributes:
        storage: a name of the module's docstring.
        bytes_per_weight: zeros counted.
    """

    storage: str
    bytes_per_weight: float


def values_of(stored_bits: float) -> Values:
    """What ``stored_bits`` of a dense weight consist of: the widest plain value, the rest is scales."""
    width = next((w for w in WIDTHS if w <= stored_bits), stored_bits)
    return Values(width, stored_bits - width)


def packings(values: Values, zeros: ZeroLayout) -> tuple[Packing, ...]:
    """Every way to store such a weight, the one of fewest bytes first; of equal ones what hardware reads.

    Args:
        values: of the weights that are not zero.
        zeros: where the others are.

    Returns:
        ``dense`` is always among them, so that zeros that are too few to pay for their places cost nothing.
    """
    kept = 1 - zeros.zero_fraction
    bits = {DENSE: values.bits}
    if zeros.group is not None:
        n, m = zeros.group
        bits["index"] = n / m * (values.bits + index_bits(m))
    bits["mask"] = kept * values.bits + 1
    if zeros.block is not None:
        rows, columns = zeros.block
        bits["block"] = (1 - zeros.block_fraction) * values.bits + 1 / (rows * columns)
    if kept and zeros.group is None:
        run = zeros.zero_fraction**16
        bits["gap"] = kept / (1 - run) * (values.bits + GAP_BITS)
    made = [Packing(storage, (b + values.scale_bits) / 8) for storage, b in bits.items()]
    return tuple(sorted(made, key=lambda packing: packing.bytes_per_weight))


def index_bits(of: int) -> int:
    """Bits that tell one of ``of`` places."""
    return ceil(log2(of))


def limit(dense: Values, packing: Packing) -> float:
    """The most that ``packing`` gains over ``dense`` at batch 1: a ratio of times, 2.0 is twice as fast."""
    return dense.bytes_per_weight / packing.bytes_per_weight


def gain_on(runtime: str, values: Values, zeros: ZeroLayout) -> float:
    """The most that these zeros gain on ``runtime`` over the same values dense, at batch 1.

    Args:
        runtime: a name of :data:`PACKED_BY`; any other is taken to know of no zeros.
        values: of the weights that are not zero.
        zeros: where the others are.

    Returns:
        1.0 where the runtime packs no such zeros: it multiplies by them.
    """
    return limit(values, packing_on(runtime, values, zeros))


def packing_on(runtime: str, values: Values, zeros: ZeroLayout) -> Packing:
    """Of the storages that ``runtime`` multiplies by, the one of fewest bytes; see :func:`gain_on`."""
    known = (DENSE, *PACKED_BY.get(runtime, ()))
    return next(p for p in packings(values, zeros) if p.storage in known)
