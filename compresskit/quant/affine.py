"""Which scale a group of weights gets: the least that reaches its extremes.

Shapes: O = out_features, I = in_features, G = groups along I, M = members of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.errors import Fault, SchemeError
from compresskit.formats.grid import Grid
from compresskit.quant.scheme import Scheme


def grid_for(weight_OI: Tensor, scheme: Scheme) -> Grid:
    """The grid whose range just covers each group of ``weight_OI``.

    The range is 2**bits - 1 steps wide and symmetric, as in compressed-tensors' own observers; the odd step
    is below zero, so a largest weight above zero is rounded down by half a step.

    Args:
        weight_OI: (O, I), any float dtype. Not modified.
        scheme: bits and groups.

    Returns:
        A grid with scales in ``weight_OI``'s dtype, all positive; a group of zeros gets scale 1.

    Raises:
        SchemeError: the group size does not divide I, or a weight is not finite.
    """
    rows, inputs = weight_OI.shape
    expected = scheme.misfit(inputs)
    if expected:
        cure = "Choose a group size that divides it, or add the layer to ignore."
        raise SchemeError(Fault(f"scheme {scheme}", expected, str(inputs), cure))
    weight_OGM = weight_OI.reshape(rows, -1, scheme.group_size or inputs)
    wide = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    largest_OG = weight_OGM.abs().amax(-1).to(wide)
    if not bool(torch.isfinite(largest_OG).all()):
        cure = "Check the checkpoint the stage before this one wrote."
        raise SchemeError(Fault(f"scheme {scheme}", "finite weights", "inf or nan", cure))
    steps = 2**scheme.weight_bits - 1
    scale_OG = (largest_OG * 2 / steps).to(weight_OI.dtype)
    # Weights so small that their scale underflows still need a scale to divide by.
    scale_OG = scale_OG.where(scale_OG > 0, torch.finfo(weight_OI.dtype).tiny).where(largest_OG > 0, 1)
    return Grid(
        bits=scheme.weight_bits,
        scale_OG=scale_OG,
        group_size=scheme.group_size,
        activation_bits=scheme.activation_bits,
    )
