"""LoRA layers of peft that see in training what a merge will make of them: zeros stay, grids stay.

Where a grid is held the whole weight is rounded onto it, and where rows have a norm of their own (DoRA) they
are given it; the gradient passes the rounding as if it were not there. Zeros alone are held by the layers of
``compresskit.training.adapters.masked``.

Paper: Bondarenko et al., "Low-Rank Quantization-Aware Training for LLMs", 2024,
https://arxiv.org/abs/2406.06385, for the rounding of weight and update together.
Shapes: O = out_features, I = in_features, R = rank, B = rows, T = tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.formats.grid import Grid
from compresskit.training.adapters.bits import frozen_weight
from compresskit.training.adapters.masked import ADAPTER, MaskedUpdate, mask_update, recomputed
from compresskit.training.adapters.merge import merged


def hold(layer: nn.Module, *, keep_OI: Tensor | None = None, grid: Grid | None = None) -> None:
    """From now on ``layer`` keeps the zeros of its frozen weight, or its grid, or both.

    Args:
        layer: a LoRA or DoRA layer of peft, its frozen weight in place.
        keep_OI: bool (O, I): weights that may move; None lets all.
        grid: what weight and update together are rounded onto; not for DoRA.
    """
    mask_update(layer, keep_OI, kind=Held)
    layer.held_grid = grid  # type: ignore[assignment]


class Held(MaskedUpdate):
    """Comes before a LoRA layer's own class; see :func:`hold`."""

    held_grid: Grid | None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (B, T, O) for an input (B, T, I)."""
        layer: Any = self
        magnitude_O = None
        if ADAPTER in layer.lora_magnitude_vector:
            magnitude_O = layer.lora_magnitude_vector[ADAPTER].weight
        if self.held_grid is None and magnitude_O is None:
            return super().forward(x)
        factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        return recomputed(self._whole, x, self.dropped(x), *factors, magnitude_O)

    def _whole(
        self, x: Tensor, dropped: Tensor | None, a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor | None
    ) -> Tensor:
        layer: Any = self
        base = layer.base_layer
        weight_OI = frozen_weight(base).to(a_RI.dtype)
        keep_OI = self.keep_OI(a_RI, b_OR)
        scaling = layer.scaling[ADAPTER]
        new_OI = merged(weight_OI, a_RI, b_OR, scaling, keep_OI=keep_OI, magnitude_O=magnitude_O)
        if self.held_grid is not None:
            snapped_OI = self.held_grid.snap(new_OI.detach()).to(new_OI.dtype)
            new_OI = new_OI + (snapped_OI - new_OI).detach()
        if dropped is None:
            return F.linear(x, new_OI.to(x.dtype), base.bias)
        # Dropout is of the adapter's input: the frozen weight sees all of x.
        changed_OI = (new_OI - weight_OI).to(x.dtype)
        return F.linear(x, weight_OI.to(x.dtype), base.bias) + F.linear(dropped, changed_OI)
