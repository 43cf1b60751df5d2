"""The weight that a low-rank adapter makes of another, exactly as its forward pass computes it.

Paper: Hu et al., "LoRA", 2021, https://arxiv.org/abs/2106.09685; Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation", 2024, https://arxiv.org/abs/2402.09353.
Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update(a_RI: Tensor, b_OR: Tensor, scaling: float, keep_OI: Tensor | None = None) -> Tensor:
    """What is added to a weight: (O, I), exactly zero wherever ``keep_OI`` (bool) is False."""
    update_OI = (b_OR @ a_RI) * scaling
    return update_OI if keep_OI is None else update_OI * keep_OI


def merged(
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    *,
    keep_OI: Tensor | None = None,
    magnitude_O: Tensor | None = None,
) -> Tensor:
    """The weight with the adapter folded in.

    Args:
        weight_OI: (O, I), in the dtype to compute in, float32 where it matters; not modified.
        a_RI: (R, I).
        b_OR: (O, R).
        scaling: alpha / R.
        keep_OI: bool; a weight that it leaves out is not updated.
        magnitude_O: of DoRA: the norm that each row is given; None is plain LoRA.

    Returns:
        (O, I); a zero of ``weight_OI`` outside of ``keep_OI`` is exactly zero.
    """
    merged_OI = weight_OI + update(a_RI, b_OR, scaling, keep_OI)
    if magnitude_O is None:
        return merged_OI
    norm_O: Tensor = torch.linalg.norm(merged_OI, dim=1)
    # A row of zeros has no direction and stays zero; divided by 1, so that no gradient is 0 / 0 either.
    share_O = magnitude_O / norm_O.where(norm_O > 0, 1.0)
    return merged_OI * share_O[:, None]
