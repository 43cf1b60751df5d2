"""ALPS: choose the support by ADMM on the layer's output, then solve for the weights on it.

Paper: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
Large Language Models", NeurIPS 2024, https://arxiv.org/abs/2406.07831. All weights are chosen together, not
block by block in one order, which is what it gains over SparseGPT, and takes longer.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.sweep import mean_square
from compresskit.options import Within
from compresskit.sparse.base import Pruned
from compresskit.sparse.pattern import Pattern, require_fit

PENALTY = 0.1
"""ADMM's first penalty, for a Hessian whose diagonal is 1."""
SOLVED = 1e-12
"""Of a row's first residual, squared: what is less is rounding, and no direction to go on in."""
EVERY = 3
"""Iterations between two looks at how far the support has moved."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""What the penalty is multiplied by where more than so large a part of the support has moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alps:
    """One-shot pruning that chooses all zeros of a layer together and solves for the weights it keeps.

    Attributes:
        pattern: which zeros are allowed, e.g. ``NM(keep=2, of=4)``.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        iterations: of ADMM at most; it ends when the support no longer moves.
        refinements: steps of conjugate gradients on the support.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})

    pattern: Pattern
    damping: Annotated[float, Within(0, 1)] = 0.01
    iterations: Annotated[int, Within(1, 10_000)] = 300
    refinements: Annotated[int, Within(0, 10_000)] = 10

    def prune(self, weight_OI: Tensor, stats: LayerStats) -> Pruned:
        """Zero weights of one linear layer and change the others; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            stats: must hold ``input_gram_II``: float32 (I, I), squared activation units.

        Returns:
            The pruned weight (O, I) in ``weight_OI``'s dtype, and its keep-mask. What was zero stays so.

        Raises:
            StatisticError: the Gram matrix is missing, misshapen, not finite or zero.
            PatternError: ``pattern`` does not fit (O, I). The plan checks this first.
        """
        require_fit(self.pattern, weight_OI)
        gram_II = stats.require("input_gram", weight_OI.shape[1])
        mean = mean_square(gram_II, stats.layer)
        scale_I = (gram_II.diagonal() + (self.damping or 1e-7) * mean).sqrt()
        key = ("alps", self.damping)
        if key not in stats.shared:
            # With every input scaled to 1 the largest weights are those that Wanda would keep.
            hessian_II = (gram_II / scale_I).div_(scale_I[:, None])
            hessian_II.fill_diagonal_(1)
            stats.shared[key] = hessian_II, *torch.linalg.eigh(hessian_II)
        hessian_II, values_I, vectors_II = stats.shared[key]
        dense_OI = (weight_OI.float() * scale_I).contiguous()
        alive_OI = (weight_OI != 0).contiguous()
        keep_OI = self._support(dense_OI, alive_OI, hessian_II, values_I, vectors_II)
        best_OI = _solve_on(keep_OI, dense_OI, hessian_II, self.refinements)
        new_OI = (best_OI / scale_I).to(weight_OI.dtype).where(keep_OI, 0)
        return Pruned(weight_OI=new_OI, keep_OI=keep_OI)

    def _support(
        self, dense_OI: Tensor, alive_OI: Tensor, hessian_II: Tensor, values_I: Tensor, vectors_II: Tensor
    ) -> Tensor:
        """The keep-mask (O, I) that ADMM ends with."""
        goal_OI = dense_OI @ hessian_II
        keep_OI = self._keep(dense_OI, alive_OI)
        sparse_OI, dual_OI = dense_OI.where(keep_OI, 0), torch.zeros_like(dense_OI)
        looked_OI, penalty = keep_OI, PENALTY
        for iteration in range(1, self.iterations + 1):
            free_OI = (goal_OI - dual_OI).add_(sparse_OI, alpha=penalty) @ vectors_II
            free_OI = free_OI.div_(values_I.clamp(min=0) + penalty) @ vectors_II.t()
            tried_OI = free_OI.add(dual_OI, alpha=1 / penalty)
            keep_OI = self._keep(tried_OI, alive_OI)
            sparse_OI = tried_OI.where(keep_OI, 0)
            dual_OI.add_(free_OI.sub_(sparse_OI), alpha=penalty)
            if iteration % EVERY:
                continue
            moved = int((keep_OI != looked_OI).sum()) / max(int(keep_OI.sum()), 1)
            if not moved:
                break
            penalty *= next(factor for least, factor in GROWTH if moved > least)
            looked_OI = keep_OI
        return keep_OI

    def _keep(self, weight_OI: Tensor, alive_OI: Tensor) -> Tensor:
        score_OI = weight_OI.abs().where(alive_OI, -1)
        return self.pattern.keep_largest(score_OI) & alive_OI


def _solve_on(keep_OI: Tensor, dense_OI: Tensor, hessian_II: Tensor, steps: int) -> Tensor:
    """The weights (O, I), zero outside ``keep_OI``, whose output is nearest to ``dense_OI``'s.

    Conjugate gradients, each row a problem of its own.
    """
    solved_OI = dense_OI.where(keep_OI, 0)
    residual_OI = ((dense_OI - solved_OI) @ hessian_II).where(keep_OI, 0)
    direction_OI, energy_O1 = residual_OI.clone(), residual_OI.square().sum(1, keepdim=True)
    least_O1 = SOLVED * energy_O1
    for _ in range(steps):
        turned_OI = (direction_OI @ hessian_II).where(keep_OI, 0)
        curve_O1 = (direction_OI * turned_OI).sum(1, keepdim=True)
        step_O1 = (energy_O1 / curve_O1).where((curve_O1 > 0) & (energy_O1 > least_O1), 0)
        solved_OI += step_O1 * direction_OI
        residual_OI -= step_O1 * turned_OI
        former_O1, energy_O1 = energy_O1, residual_OI.square().sum(1, keepdim=True)
        direction_OI = residual_OI + (energy_O1 / former_O1).where(former_O1 > 0, 0) * direction_OI
    return solved_OI
