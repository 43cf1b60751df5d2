"""The Gram matrix of a layer's inputs, at half the products and, where nothing is lost by it, in bfloat16.

A product of two bfloat16 numbers has 16 significant bits and is exact in float32, so that rounding the
factors to bfloat16, which they are already, and summing up in float32 loses no more than float32 alone: the
sum's own rounding.

Shapes: T = tokens, I = in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_TOKENS = 2048
SIDE = 256
"""Rows that are mirrored at a time: a copy of the matrix would be as large as it."""


class Workspace:
    """Memory for inputs in float32, one of which at a time is looked at.

    Fresh memory each time would take longer to get than to fill.
    """

    def __init__(self) -> None:
        self._flat = torch.empty(0, dtype=torch.float32)

    def widened(self, input_TI: Tensor) -> Tensor:
        """``input_TI`` (T, I) in float32; written over by the next call."""
        if self._flat.numel() < input_TI.numel() or self._flat.device != input_TI.device:
            self._flat = torch.empty(input_TI.numel(), dtype=torch.float32, device=input_TI.device)
        return self._flat[: input_TI.numel()].view(input_TI.shape).copy_(input_TI)


def add_gram(sum_II: Tensor, input_TI: Tensor, workspace: Workspace | None = None) -> None:
    """Add x x^T of every token of ``input_TI`` to ``sum_II``, on and below the diagonal only.

    Args:
        sum_II: float32, (I, I), changed in place. What stands above the diagonal is not to be used before
            :func:`mirror`.
        input_TI: any float dtype; products of float16 and float32 are taken in float32.
        workspace: to be used; None makes one.
    """
    inputs = input_TI.shape[1]
    workspace = workspace or Workspace()
    side = 256 if inputs <= 2048 else 512
    with bfloat16_factors(input_TI.dtype == torch.bfloat16):
        for first in range(0, len(input_TI), MAX_TOKENS):
            x_TI = workspace.widened(input_TI[first : first + MAX_TOKENS])
            for start in range(0, inputs, side):
                stop = min(start + side, inputs)
                sum_II[start:stop, :stop].addmm_(x_TI[:, start:stop].t(), x_TI[:, :stop])


def mirror(sum_II: Tensor) -> None:
    """Copy what is below the diagonal to above it, in place."""
    inputs = len(sum_II)
    for start in range(0, inputs, SIDE):
        stop = min(start + SIDE, inputs)
        corner = sum_II[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        sum_II[start:stop, stop:] = sum_II[stop:, start:stop].t()


@contextmanager
def bfloat16_factors(wanted: bool) -> Iterator[None]:
    """Within, the CPU's float32 matrix products round their factors (not their sums) to bfloat16."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    try:
        if wanted:
            settings.fp32_precision = "bf16"
        yield
    finally:
        settings.fp32_precision = before
