"""Where an adapter starts from: at the error that freezing in few bits makes.

Plain LoRA starts from a zero update, hence from the quantised model. Here the frozen weight Q and the update
B A are chosen together, so that Q + B A is close to the weight as it was: in turn, Q is what the rest of the
weight is rounded to, and B A the best approximation of what that leaves.

Paper: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization", 2023, https://arxiv.org/abs/2310.08659,
algorithm 1.
Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.training.adapters.merge import update


class Start(NamedTuple):
    """A weight to freeze, (O, I), before it is rounded, and the factors (R, I) and (O, R) of the update."""

    rest_OI: Tensor
    a_RI: Tensor
    b_OR: Tensor


def loftq(
    weight_OI: Tensor,
    rounding: Callable[[Tensor], Tensor],
    *,
    rank: int,
    scaling: float,
    rounds: int,
    keep_OI: Tensor | None = None,
) -> Start:
    """Alternate between rounding and approximating the error.

    Args:
        weight_OI: (O, I), any float dtype; not modified.
        rounding: what freezing does to a weight (O, I).
        rank: R, at most min(O, I).
        scaling: that the update is multiplied by.
        rounds: alternations, at least 1; that one approximates the error of plain rounding.
        keep_OI: bool; where it is False weight and update are zero.

    Returns:
        ``rounding(rest) + scaling * b @ a`` is close to the weight, in float32.
    """
    weight_OI = weight_OI.float()
    update_OI = torch.zeros_like(weight_OI)
    for _ in range(rounds):
        rest_OI = weight_OI - update_OI
        u, s, vh = torch.linalg.svd(weight_OI - rounding(rest_OI), full_matrices=False)
        root_R = (s[:rank] / scaling).sqrt()
        start = Start(rest_OI, root_R[:, None] * vh[:rank], u[:, :rank] * root_R)
        update_OI = update(start.a_RI, start.b_OR, scaling, keep_OI)
    return start
