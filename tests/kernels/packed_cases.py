"""Weights and inputs that packed layouts are tried with, and the exact answer.

Shapes: O = outputs, I = inputs, N = tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compresskit.kernels.bitmap import Bitmap, pack, unpack

SHAPES = [(1, 1), (3, 8), (5, 13), (16, 64), (7, 130), (33, 200), (2, 1090)]
TOKENS = (0, 1, 2, 3, 7, 17, 64, 65)
ZEROS = ("half", "most", "none", "2:4", "rows")
GROUPS = {"half": None, "most": None, "none": None, "rows": None, "2:4": (2, 4)}
"""Kind of zeros -> the group that is known of it."""


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep(shape: tuple[int, int], zeros: str) -> Tensor:
    """bool (O, I): ``rows`` has rows without any kept weight and full ones."""
    score = draw(shape, 1)
    if zeros == "2:4":
        keep_OI = torch.zeros(shape, dtype=torch.bool)
        for row, group in torch.cartesian_prod(
            *(torch.arange(n) for n in (shape[0], -(-shape[1] // 4)))
        ).tolist():
            part = score[row, 4 * group : 4 * group + 4]
            best = part.topk(min((row + group) % 3, len(part))).indices
            keep_OI[row, 4 * group : 4 * group + 4] = torch.zeros(len(part), dtype=torch.bool).scatter(
                0, best, True
            )
        return keep_OI
    if zeros == "rows":
        return (torch.arange(shape[0]) % 3 == 0)[:, None].expand(shape) | (
            (torch.arange(shape[0]) % 3 == 1)[:, None] & (score > 0)
        )
    return score > {"half": 0.0, "most": 1.5, "none": -torch.inf}[zeros]


def weight(shape: tuple[int, int], dtype: torch.dtype, zeros: str = "half", groups: int = 1) -> Bitmap:
    """A weight of kept values that are not zero; int8 ones have ``groups`` scales a row."""
    dense_OI, kept_OI = draw(shape, 2), keep(shape, zeros)
    if dtype == torch.int8:
        whole_OI = (dense_OI * 50).round().clamp(-127, 127)
        whole_OI = torch.where(whole_OI == 0, 1, whole_OI).to(torch.int8)
        return pack(whole_OI * kept_OI, draw((shape[0], groups), 3).abs() / 50 + 0.01)
    dense_OI = torch.where(dense_OI == 0, 1, dense_OI).to(dtype)
    return pack(torch.where(kept_OI, dense_OI, 0))


def inputs_of(tokens: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The same inputs contiguous, with strides, and from where no vector begins; then three-dimensional."""
    plain = draw((tokens, width), 4).to(dtype)
    yield plain
    strided = torch.empty(width, tokens, dtype=dtype).T
    yield strided.copy_(plain)
    shifted = torch.empty(tokens * width + 1, dtype=dtype)[1:].view(tokens, width)
    yield shifted.copy_(plain)
    yield plain[:, None]


def exact(inputs: Tensor, packed: Bitmap, bias_O: Tensor | None) -> Tensor:
    """The product in float64."""
    scaled = unpack(
        Bitmap(
            mask_OB=packed.mask_OB,
            values_K=packed.values_K.double(),
            in_features=packed.in_features,
            scales_OG=None if packed.scales_OG is None else packed.scales_OG.double(),
        )
    )
    return linear(inputs.double(), scaled, None if bias_O is None else bias_O.double())


def fields_of(packed: Bitmap) -> dict[str, Any]:
    return {field.name: getattr(packed, field.name) for field in fields(packed)}


def tolerance(inputs: Tensor, packed: Bitmap, bias_O: Tensor | None) -> Tensor:
    """Three times what torch errs at most in fp32, rounded to the inputs' type, or what additions may err.

    That is a unit of the result and one of fp32 for the sum of all products' sizes: torch itself adds up
    in another order for other shapes and strides.
    """
    true = exact(inputs, packed, bias_O)
    bias_O = None if bias_O is None else bias_O.float()
    torchs = linear(inputs.float(), unpack(packed, torch.float32), bias_O).to(inputs.dtype)
    error = (torchs.double() - true).abs().max() if true.numel() else torch.zeros(())
    sizes = exact(inputs.abs(), Bitmap(**{**fields_of(packed), "values_K": packed.values_K.abs()}), None)
    adding = torch.finfo(torch.float32).eps * sizes
    return 3 * error + adding + torch.finfo(inputs.dtype).eps * true.abs().clamp_min(1e-30)
