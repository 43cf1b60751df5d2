"""The contract of a packed layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compresskit.kernels.bitmap import Bitmap

Packed = tuple[Tensor, ...]
"""The tensors of a layout; only its own file knows what they mean."""
SLACK_BYTES = 64
"""After the last value, where vectors are read from the middle of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be multiplied, as far as a layout must know to say whether it can.

    Attributes:
        out_features, in_features: of the weight.
        values: type of the kept values; int8 ones have scales.
        inputs: type of the inputs and of the result.
        zero_fraction: of the weight.
        group: (N, M) where no M consecutive inputs keep more than N; None where nothing is known.
        block: (rows, columns) of the blocks that zeros fill whole; None where nothing is known.
        device: ``cpu`` or ``cuda``.
        tokens: rows of the input.
    """

    out_features: int
    in_features: int
    values: torch.dtype
    inputs: torch.dtype
    zero_fraction: float
    group: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    device: str = "cpu"
    tokens: int = 1


class Layout(Protocol):
    """Stateless. Its op is registered with torch as ``compresskit::<op>``, with a fake and a gradient.

    Attributes:
        op: name of the op, and of the files in ``reference/``, ``cpu/``, ``triton/``, ``cuda/``.
    """

    op: str

    def refusal(self, case: Case) -> str:
        """Why it cannot, or must not, multiply in such a case, as a phrase; empty where it can."""
        ...

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``."""
        ...

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit, on the CPU."""
        ...

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        Any shape before the last, any strides, no rows at all; differentiable for the inputs and the bias.
        Values that require a gradient get one where the layout says so, and are refused where it does not.
        """
        ...
