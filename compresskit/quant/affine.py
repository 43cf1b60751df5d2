"""Which scale a group of weights gets: the least that reaches its extremes, or the one that errs least.

Shapes: O = out_features, I = in_features, G = groups along I, M = members of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.errors import Fault, SchemeError
from compresskit.formats.grid import FLOAT8_MAX, Grid
from compresskit.quant.scheme import Scheme

SHRINKS = tuple(1 - step / 40 for step in range(21))
"""Fractions of the full range that :func:`least_error_grid` tries."""
CHUNK = 1 << 17
"""Weights whose ranges are tried at a time: few enough to stay in a core's cache."""


def grid_for(weight_OI: Tensor, scheme: Scheme, shrink_OG: Tensor | float = 1.0) -> Grid:
    """The grid whose range just covers each group of ``weight_OI``.

    A symmetric integer range is 2**bits - 1 steps wide, as in compressed-tensors' own observers; the odd step
    is below zero, so a largest weight above zero is rounded down by half a step.

    Args:
        weight_OI: (O, I), any float dtype. Not modified.
        scheme: bits and groups.
        shrink_OG: cover only this fraction of each group's range; what lies outside goes to its end.

    Returns:
        A grid with scales in ``weight_OI``'s dtype, all positive; a group of zeros gets scale 1.

    Raises:
        SchemeError: the group size does not divide I, or a weight is not finite.
    """
    low_OG, high_OG = _range_of(weight_OI, scheme)
    return _grid_over(low_OG * shrink_OG, high_OG * shrink_OG, scheme, weight_OI.dtype)


def _range_of(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group, zero counted in; each (O, G), float32 or wider."""
    weight_OGM = _groups(weight_OI, scheme)
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    low_OG, high_OG = weight_OGM.amin(-1).to(wide).clamp(max=0), weight_OGM.amax(-1).to(wide).clamp(min=0)
    if not bool(torch.isfinite(high_OG - low_OG).all()):
        cure = "Check the checkpoint the stage before this one wrote."
        raise SchemeError(Fault(f"scheme {scheme}", "finite weights", "inf or nan", cure))
    return low_OG, high_OG


def _grid_over(low_OG: Tensor, high_OG: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid that covers ``low_OG`` to ``high_OG``, its scales in ``dtype``."""
    largest_OG = torch.maximum(high_OG, -low_OG)
    steps = 2**scheme.weight_bits - 1
    if scheme.number == "nf4":
        scale_OG = largest_OG
    elif scheme.number == "float":
        scale_OG = largest_OG / FLOAT8_MAX
    else:
        scale_OG = (largest_OG * 2 if scheme.symmetric else high_OG - low_OG) / steps
    scale_OG = scale_OG.to(dtype)
    # Weights so small that their scale underflows still need a scale to divide by.
    tiny = torch.finfo(dtype).tiny
    scale_OG = scale_OG.where(scale_OG > 0, tiny).where(largest_OG > 0, 1)
    zero_OG = None
    if not scheme.symmetric:
        half = 2 ** (scheme.weight_bits - 1)
        zero_OG = (-half - low_OG / scale_OG.to(low_OG)).round().clamp(-half, half - 1).to(torch.int8)
    return Grid(
        bits=scheme.weight_bits,
        scale_OG=scale_OG,
        group_size=scheme.group_size,
        activation_bits=scheme.activation_bits,
        number=scheme.number,
        zero_point_OG=zero_OG,
    )


def least_error_grid(weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None = None) -> Grid:
    """The grid, of those that cover a fraction of each group's range, with the least squared rounding error.

    Args:
        weight_OI: (O, I), any float dtype. Not modified.
        scheme: bits and groups.
        importance_I: (I,), not negative: what a squared error of each input's weights costs; None: the same.

    Returns:
        A grid that errs no more, in any group, than :func:`grid_for`'s.

    Raises:
        SchemeError: as :func:`grid_for`.
    """
    rows = max(1, CHUNK // weight_OI.shape[1])
    parts = torch.split(weight_OI, rows)
    shrinks = [_least_error_shrink(part_OI, scheme, importance_I) for part_OI in parts]
    return grid_for(weight_OI, scheme, torch.cat(shrinks))


def _least_error_shrink(weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None) -> Tensor:
    """Of :data:`SHRINKS` the one with the least error in each group, (O, G)."""
    exact_OI = weight_OI.float()
    low_OG, high_OG = _range_of(weight_OI, scheme)
    weights_I = torch.ones((), device=weight_OI.device) if importance_I is None else importance_I.sqrt()
    errors = []
    for shrink in SHRINKS:
        grid = _grid_over(low_OG * shrink, high_OG * shrink, scheme, weight_OI.dtype)
        error_OI = grid.snap(exact_OI).float().sub_(exact_OI).mul_(weights_I).square_()
        errors.append(error_OI.reshape(*low_OG.shape, -1).sum(-1))
    # The first of equals is the widest range.
    return torch.tensor(SHRINKS, device=weight_OI.device)[torch.stack(errors).argmin(0)]


def activation_scale(abs_max_I: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale (1,) in ``dtype`` of inputs of which the largest of each feature are ``abs_max_I`` (I,)."""
    largest = abs_max_I.max().reshape(1)
    return (largest * 2 / (2**8 - 1)).to(dtype).where(largest > 0, 1)


def _groups(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    rows, inputs = weight_OI.shape
    if expected := scheme.misfit(inputs):
        cure = "Choose a group size that divides it, or add the layer to ignore."
        raise SchemeError(Fault(f"scheme {scheme}", expected, str(inputs), cure))
    return weight_OI.reshape(rows, -1, scheme.group_size or inputs)
