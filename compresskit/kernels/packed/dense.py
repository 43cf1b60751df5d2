"""The layout ``dense``: zeros are values like any other, and torch multiplies.

Shapes: O = outputs, I = inputs, B = bytes of a row's mask, G = groups of inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskit.kernels.bitmap import Bitmap, pack_bits, unpack, unpack_bits
from compresskit.kernels.packed.base import Case, Packed
from compresskit.kernels.packed.rules import type_refusal
from compresskit.kernels.reference.dense_linear import dense_linear


@dataclass(frozen=True, slots=True)
class Dense:
    """Its op is torch's own, which has a gradient and is traced as it is. The tensors are, in this order:

    * weight_OI: in the values' type.
    * scales_OG: fp32, of int8 values; (O, 0) for other values.
    * mask_OB: of the kept weights where some of these are zero; else (O, 0), for the zeros are the mask.
    """

    op: str = "dense_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        return type_refusal(case)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``."""
        here = replace(weight, mask_OB=weight.mask_OB.cpu(), values_K=weight.values_K.cpu(), scales_OG=None)
        keep_OI, weight_OI = unpack_bits(here.mask_OB, here.in_features), unpack(here)
        none = torch.empty(len(keep_OI), 0, device="cpu")
        scales_OG = none if weight.scales_OG is None else weight.scales_OG.float().contiguous()
        tells = torch.equal(weight_OI != 0, keep_OI)
        mask_OB = none.to(torch.uint8) if tells else weight.mask_OB
        return tuple(tensor.to(device) for tensor in (weight_OI, scales_OG, mask_OB))

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit, on the CPU."""
        weight_OI, scales_OG, mask_OB = (tensor.cpu() for tensor in packed)
        keep_OI = unpack_bits(mask_OB, in_features) if mask_OB.shape[1] else weight_OI != 0
        return Bitmap(
            mask_OB=pack_bits(keep_OI),
            values_K=weight_OI[keep_OI],
            in_features=in_features,
            scales_OG=scales_OG if scales_OG.shape[1] else None,
        )

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type, as torch sums."""
        return dense_linear(inputs, packed[0], packed[1], bias_O)
