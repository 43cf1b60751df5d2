"""Are a model's logits what its output projection makes of its last hidden states? Found out by trying.

The fused losses make logits themselves, from those states, the projection and its softcap. Of a model that
scales its logits, or does more between the two, they would make others, and teach or learn something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compresskit.errors import Fault
from compresskit.training.objective import head_module, softcap_of

TOKENS = 4
LOUDER = 100.0
"""What a projection with random weights is multiplied by: as small as those are, a softcap would not show."""
NOISE = 1e-4
"""Relative difference that rounding alone can make in float32."""


def projects_otherwise(model: nn.Module) -> bool:
    """Whether the logits of ``model`` are others than the fused losses would make.

    Args:
        model: a causal language model with random weights, in float32; its projection is multiplied.
    """
    base: Any = getattr(model, "base_model", model)
    head, softcap = head_module(model), softcap_of(model)
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    ids = torch.arange(TOKENS)[None]
    trains = model.training
    model.eval()
    try:
        with torch.no_grad():
            weight.mul_(LOUDER)
            expected = head(base(input_ids=ids, position_ids=ids, use_cache=False)[0])
            expected = softcap * torch.tanh(expected / softcap) if softcap else expected
            found = model(input_ids=ids, position_ids=ids, use_cache=False).logits
    finally:
        model.train(trains)
    return bool((found - expected).norm() > NOISE * expected.norm())


def projection_fault(where: str, model: str) -> Fault:
    """The fault of a ``model`` whose logits are others than the fused losses would make."""
    return Fault(
        where,
        "a model whose logits are its output projection of its last hidden states",
        f"{model}, which changes the ones or the others",
        "Choose another model: the fused losses do not know what it does.",
    )
