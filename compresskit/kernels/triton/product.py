"""What the twins do alike: how a product is divided among programs, and how a decoded tile is multiplied.

Shapes: N = tokens, O = outputs, I = inputs, R = rows of a tile, T = tokens of one, 64 = inputs of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_INPUTS = 64
ROWS = 16
SEVERAL = 16
"""Tokens of a program where there are several: the fewest that tensor cores take."""


@dataclass(frozen=True, slots=True)
class Division:
    """How a product is divided: ``grid`` of programs, each with ``tokens`` of the tokens."""

    grid: tuple[int, int]
    tokens: int


@triton.jit
def scaled(weight, scales, row, input_, rows, groups, group_width, HAS_SCALES: tl.constexpr):
    """Each weight of a tile times the scale of its group."""
    if HAS_SCALES:
        group = input_[None, :] // group_width
        inside = (row[:, None] < rows) & (group < groups)
        weight = weight.to(tl.float32) * tl.load(
            scales + row[:, None] * groups + group, mask=inside, other=0.0
        )
    return weight


@triton.jit
def multiplied(
    sums, weight, inputs, token, input_, tokens, width, TOKENS: tl.constexpr, NARROW: tl.constexpr
):
    """``sums`` and what a tile (R, 64) gives: (R, 64) of one token, else (R, T)."""
    if TOKENS == 1:
        x = tl.load(
            inputs + token[:, None] * width + input_[None, :], mask=(input_ < width)[None, :], other=0.0
        )
        sums += weight.to(tl.float32) * x.to(tl.float32)
    else:
        inside = (token[None, :] < tokens) & (input_[:, None] < width)
        x = tl.load(inputs + token[None, :] * width + input_[:, None], mask=inside, other=0.0)
        if NARROW:
            sums = tl.dot(weight.to(x.dtype), x, sums)
        else:
            sums = tl.dot(weight.to(tl.float32), x.to(tl.float32), sums, input_precision="ieee")
    return sums


@triton.jit
def written(sums, out, bias, row, token, rows, tokens, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Put the sums of a program into ``out`` (N, O)."""
    total = tl.sum(sums, 1)[:, None] if TOKENS == 1 else sums
    inside = (row[:, None] < rows) & (token[None, :] < tokens)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + token[None, :] * rows + row[:, None], total.to(out.dtype.element_ty), mask=inside)


def divided(
    inputs: Tensor, outputs: int, run: Callable[[Division, Tensor, Tensor, dict[str, Any]], None]
) -> Tensor:
    """``run(division, inputs_NI, out_NO, flags)`` for inputs of any shape.

    Args:
        inputs: (..., I), any strides.
        outputs: O.
        run: starts programs that write all of ``out_NO``; ``flags`` are tile sizes they are compiled for.

    Returns:
        (..., O) in the inputs' type.
    """
    rows_NI = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    out_NO = torch.empty(len(rows_NI), outputs, dtype=inputs.dtype, device=inputs.device)
    if out_NO.numel():
        tokens = 1 if len(rows_NI) == 1 else SEVERAL
        division = Division((triton.cdiv(outputs, ROWS), triton.cdiv(len(rows_NI), tokens)), tokens)
        run(division, rows_NI, out_NO, {"ROWS": ROWS, "TOKENS": tokens})
    return out_NO.reshape(*inputs.shape[:-1], outputs)


def flags_of(inputs: Tensor, values: Tensor, bias_O: Tensor | None) -> dict[str, Any]:
    """What kernels are compiled for besides tile sizes; the interpreter takes bf16 for its bits in a dot."""
    same = inputs.dtype == values.dtype and inputs.element_size() == 2
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "HAS_BIAS": bias_O is not None,
        "NARROW": same and not (interpreted and inputs.dtype == torch.bfloat16),
    }
