"""LoRA layers of peft that see in training what a merge will make of them: zeros stay, grids stay.

The class of a layer is swapped in place, so parameters keep their names and every engine wraps it as before.
Where zeros are held the update is masked, and where a grid is held the whole weight is rounded onto it; the
gradient passes the rounding as if it were not there. The mask is kept in one bit per weight, and nothing of
the size of a weight lives from the forward to the backward pass.

Paper: Bondarenko et al., "Low-Rank Quantization-Aware Training for LLMs", 2024,
https://arxiv.org/abs/2406.06385, for the rounding of weight and update together.
Shapes: O = out_features, I = in_features, R = rank, B = rows, T = tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compresskit.formats.grid import Grid
from compresskit.quant.adapters.frozen import frozen_weight
from compresskit.quant.adapters.merge import merged, update

ADAPTER = "default"
"""The name peft gives to an adapter that is not named."""


def hold(layer: nn.Module, *, keep_OI: Tensor | None = None, grid: Grid | None = None) -> None:
    """From now on ``layer`` keeps the zeros of its frozen weight, or its grid, or both.

    Args:
        layer: a LoRA or DoRA layer of peft, its frozen weight in place.
        keep_OI: bool (O, I): weights that may move; None lets all.
        grid: what weight and update together are rounded onto; not for DoRA.
    """
    kind = type(layer)
    layer.__class__ = type(f"Held{kind.__name__}", (Held, kind), {})
    layer.held_grid = grid  # type: ignore[assignment]
    layer.register_buffer("keep_bits", None if keep_OI is None else packed(keep_OI), persistent=False)


class Held:
    """Comes before a LoRA layer's own class; see :func:`hold`."""

    held_grid: Grid | None
    keep_bits: Tensor | None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update (O, I), masked; what peft's own merge adds."""
        layer: Any = self
        a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return update(a_RI, b_OR, float(layer.scaling[adapter]), self._keep_OI(a_RI, b_OR))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (B, T, O) for an input (B, T, I)."""
        layer: Any = self
        dropout = layer.lora_dropout[ADAPTER]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        dropped = dropout(x) if drops else None
        factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        magnitude_O = None
        if ADAPTER in layer.lora_magnitude_vector:
            magnitude_O = layer.lora_magnitude_vector[ADAPTER].weight
        if self.held_grid is None and magnitude_O is None:
            output: Tensor = layer.base_layer(x)
            return output + _recomputed(self._add, x if dropped is None else dropped, *factors)
        return _recomputed(self._whole, x, dropped, *factors, magnitude_O)

    def _add(self, x: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        layer: Any = self
        update_OI = update(a_RI, b_OR, layer.scaling[ADAPTER], self._keep_OI(a_RI, b_OR))
        return F.linear(x, update_OI.to(x.dtype))

    def _whole(
        self, x: Tensor, dropped: Tensor | None, a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor | None
    ) -> Tensor:
        layer: Any = self
        base = layer.base_layer
        weight_OI = frozen_weight(base).to(a_RI.dtype)
        keep_OI = self._keep_OI(a_RI, b_OR)
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

    def _keep_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor | None:
        if self.keep_bits is None:
            return None
        return unpacked(self.keep_bits, (b_OR.shape[0], a_RI.shape[1]))


def _recomputed(function: Any, *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)``, of which only the inputs are kept for the backward pass."""
    made: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return made


def packed(keep: Tensor) -> Tensor:
    """A mask as uint8, eight of its members in each."""
    flat = keep.reshape(-1)
    bits_N8 = nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).reshape(-1, 8)
    powers_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (bits_N8 * powers_8).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of :func:`packed`: bool of ``shape``."""
    places_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits[:, None] >> places_8).bitwise_and_(1).reshape(-1)
    return flat[: shape[0] * shape[1]].reshape(shape).bool()
