"""A weight that no longer moves and that an earlier stage put on a grid, kept as its own integers.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.formats.grid import Grid


class GridLinear(nn.Linear):
    """A frozen layer whose weight lies on a grid: one byte per weight, the very values of the checkpoint.

    Args:
        weight_OI: (O, I), on ``grid`` to the bit.
        bias_O: or None.
        grid: of the layer.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, grid: Grid) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        self.grid = grid
        # As bytes, so that a cast of the whole model to float32 leaves them alone.
        levels_OI = grid.quantize(weight_OI)
        self._levels = levels_OI.dtype
        self.register_buffer("levels_OI", levels_OI.view(torch.uint8), persistent=False)
        bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (O, I) in float32."""
        levels: Tensor = self.levels_OI  # type: ignore[assignment]
        return self.grid.dequantize(levels.view(self._levels)).float()

    def forward(self, input: Tensor) -> Tensor:
        """As ``torch.nn.Linear``."""
        return F.linear(input, self.weight, self.bias)
