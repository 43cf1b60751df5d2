"""LoRA layers of peft that see in training what a merge will make of them: zeros stay.

The class of a layer is swapped in place, so parameters keep their names and every engine wraps it as before.
The mask is kept in one bit per weight, and nothing of the size of a weight lives from the forward to the
backward pass.

Paper: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023,
https://arxiv.org/abs/2312.15230, for updates that a mask lets merge.
Shapes: O = out_features, I = in_features, R = rank, B = rows, T = tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compresskit.training.adapters.merge import update

ADAPTER = "default"
"""The name peft gives to an adapter that is not named."""


def mask_update(layer: nn.Module, keep_OI: Tensor | None, *, kind: type[MaskedUpdate] | None = None) -> None:
    """From now on the update of ``layer`` is zero wherever ``keep_OI`` is False.

    Args:
        layer: a LoRA layer of peft, its frozen weight in place.
        keep_OI: bool (O, I): weights that may move; None lets all.
        kind: what comes before the layer's own class: :class:`MaskedUpdate`, or a class derived of it.
    """
    kind = kind or MaskedUpdate
    own = type(layer)
    layer.__class__ = type(f"{kind.__name__}{own.__name__}", (kind, own), {})
    layer.register_buffer("keep_bits", None if keep_OI is None else packed(keep_OI), persistent=False)


class MaskedUpdate:
    """Comes before a LoRA layer's own class; see :func:`mask_update`."""

    keep_bits: Tensor | None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update (O, I), masked; what peft's own merge adds."""
        layer: Any = self
        a_RI, b_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return update(a_RI, b_OR, float(layer.scaling[adapter]), self.keep_OI(a_RI, b_OR))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (B, T, O) for an input (B, T, I)."""
        layer: Any = self
        dropped = self.dropped(x)
        output: Tensor = layer.base_layer(x)
        factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        return output + recomputed(self._add, x if dropped is None else dropped, *factors)

    def dropped(self, x: Tensor) -> Tensor | None:
        """The adapter's input; None where it is ``x`` itself."""
        layer: Any = self
        dropout = layer.lora_dropout[ADAPTER]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        return dropout(x) if drops else None

    def keep_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor | None:
        """Which weights may move: bool (O, I); None for all."""
        if self.keep_bits is None:
            return None
        return unpacked(self.keep_bits, (b_OR.shape[0], a_RI.shape[1]))

    def _add(self, x: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        layer: Any = self
        update_OI = update(a_RI, b_OR, layer.scaling[ADAPTER], self.keep_OI(a_RI, b_OR))
        return F.linear(x, update_OI.to(x.dtype))


def recomputed(function: Any, *inputs: Tensor | None) -> Tensor:
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
