"""The product with a dense weight, whatever its type.

Shapes: O = outputs, I = inputs, G = groups of inputs that share a scale.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def dense_linear(inputs: Tensor, weight_OI: Tensor, scales_OG: Tensor, bias_O: Tensor | None) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O) in the inputs' type, as torch sums it.

    Args:
        inputs: (..., I).
        weight_OI: in any type; int8 is multiplied by its scales.
        scales_OG: fp32; (O, 0) for other types.
        bias_O: in any type, or None.
    """
    if scales_OG.shape[1]:
        weight_OI = scaled(weight_OI.float(), scales_OG)
    bias_O = None if bias_O is None else bias_O.to(inputs.dtype)
    return linear(inputs, weight_OI.to(inputs.dtype), bias_O)


def scaled(weight_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """Each weight times the scale of its group."""
    groups = scales_OG.shape[1]
    if groups == 1:
        return weight_OI * scales_OG.to(weight_OI.dtype)
    return (weight_OI.reshape(len(weight_OI), groups, -1) * scales_OG[..., None].to(weight_OI.dtype)).flatten(
        1
    )


def wide_linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """``inputs @ weight.T + bias`` in the weight's type, rounded once, to the inputs' type."""
    bias_O = None if bias_O is None else bias_O.to(weight_OI.dtype)
    return linear(inputs.to(weight_OI.dtype), weight_OI, bias_O).to(inputs.dtype)
