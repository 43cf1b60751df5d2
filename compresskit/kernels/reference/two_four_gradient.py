"""The gradient of the values of the layout ``two_four``. Shapes: ``packed/two_four.py``; R = rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.packed.rules import GROUP
from compresskit.kernels.packed.two_four import row_values, slots, unpack_places
from compresskit.kernels.reference.dense_gradient import dense_gradient


def two_four_gradient(
    grad: Tensor, inputs: Tensor, values_S: Tensor, places_OW: Tensor, scales_OG: Tensor
) -> Tensor:
    """Like ``values_S``: what the dense weight's gradient has where a weight is kept; 0 in what fills up."""
    out_S = torch.zeros_like(values_S)
    out_OF2 = row_values(out_S, places_OW)
    for rows, dense_RI in dense_gradient(grad, inputs):
        low_RF, high_RF = (place[..., None] for place in unpack_places(places_OW[rows]))
        slots_RF2 = torch.stack(slots(low_RF[..., 0], high_RF[..., 0]), -1)
        dense_RF4 = pad(dense_RI, (0, -dense_RI.shape[1] % (low_RF.shape[1] * GROUP)))
        kept_RF2 = ((slots_RF2 == low_RF) | (slots_RF2 == high_RF)) & (low_RF <= high_RF)
        found_RF2 = dense_RF4.view(*low_RF.shape[:2], GROUP).gather(-1, slots_RF2)
        out_OF2[rows] = found_RF2.where(kept_RF2, 0).to(out_S.dtype)
    return out_S
