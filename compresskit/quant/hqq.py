"""HQQ: fit each group's scale and zero point to its weights by a norm of the error. No data.

Paper: Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
https://mobiusml.github.io/hqq_blog. There zero points are real numbers and scales stay; here scales are
fitted too, and zero points are integers, as every runtime of this package's formats wants them.

Shapes: O = out_features, I = in_features, G = groups along I, M = members of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.formats.grid import Grid
from compresskit.options import Within
from compresskit.quant.affine import grid_for
from compresskit.quant.base import Quantized
from compresskit.quant.scheme import Scheme

STARTS = (1.0, 0.85, 0.7)
"""Fractions of each group's range to start from: fitting ends in the nearest optimum, not in the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfQuadratic:
    """One-shot quantisation without data that minimises the p-norm of the rounding error.

    Attributes:
        norm: p of the sum of ``|error|**p`` to minimise, above 0. Below 1, as in the paper, outliers hardly
            count; models of under a million parameters were seen to lose more by that than they gain.
        beta: weight of the quadratic half, for errors in steps of the grid; at least 1.
        growth: factor, at least 1, that raises it from one iteration to the next.
        iterations: of fitting, from each of three ranges; the best grid of all is taken, group by group.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    norm: Annotated[float, Within(0, above=True)] = 2.4
    beta: Annotated[float, Within(1)] = 10.0
    growth: Annotated[float, Within(1)] = 1.01
    iterations: Annotated[int, Within(0)] = 20

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats | None = None) -> Quantized:
        """Quantise one linear layer's weight; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            scheme: bits and groups.
            stats: not used.

        Returns:
            The rounded weight (O, I) in ``weight_OI``'s dtype, and its grid. Zeros stay exactly zero.

        Raises:
            SchemeError: the group size does not divide I, or a weight is not finite.
        """
        weight_OI = weight_OI.contiguous()  # so that sums come out the same whatever its strides
        best = grid_for(weight_OI, scheme)
        least_OG = self._error(weight_OI, best)
        for start in STARTS if self.iterations else ():
            grid, beta = grid_for(weight_OI, scheme, start), self.beta
            for _ in range(self.iterations):
                grid = self._fitted(weight_OI, grid, beta)
                error_OG = self._error(weight_OI, grid)
                best = _better(grid, best, error_OG < least_OG)
                least_OG = torch.minimum(least_OG, error_OG)
                beta *= self.growth
        return Quantized(weight_OI=best.snap(weight_OI), grid=best)

    def _error(self, weight_OI: Tensor, grid: Grid) -> Tensor:
        """Sum of ``|error|**p`` of each group, (O, G)."""
        error_OI = (grid.snap(weight_OI).float() - weight_OI.float()).abs_().pow_(self.norm)
        return error_OI.reshape(*grid.scale_OG.shape, -1).sum(-1)

    def _fitted(self, weight_OI: Tensor, grid: Grid, beta: float) -> Grid:
        """The grid that is best in least squares once what outliers err by is left out."""
        groups = (*grid.scale_OG.shape, -1)
        scale_OG1 = grid.scale_OG.float().unsqueeze(-1)
        weight_OGM = weight_OI.float().reshape(groups)
        level_OGM = grid.snap(weight_OI).float().reshape(groups) / scale_OG1
        error_OGM = weight_OGM / scale_OG1 - level_OGM
        size_OGM = error_OGM.abs()
        left_OGM = error_OGM.sign() * (size_OGM - size_OGM.clamp(min=1e-6).pow(self.norm - 1) / beta).relu()
        target_OGM = weight_OGM - left_OGM * scale_OG1
        new_OG = (level_OGM * target_OGM).sum(-1) / level_OGM.square().sum(-1).clamp(min=1e-12)
        usable_OG = (new_OG > 0) & (new_OG.to(weight_OI.dtype) > 0)
        scale_OG = new_OG.to(weight_OI.dtype).where(usable_OG, grid.scale_OG)
        if grid.zero_point_OG is None:
            return replace(grid, scale_OG=scale_OG)
        half = 2 ** (grid.bits - 1)
        moved_OG = (level_OGM - target_OGM / scale_OG.float().unsqueeze(-1)).mean(-1).round()
        zero_OG = (grid.zero_point_OG + moved_OG).clamp(-half, half - 1).to(torch.int8)
        return replace(grid, scale_OG=scale_OG, zero_point_OG=zero_OG)


def _better(one: Grid, other: Grid, one_is_better_OG: Tensor) -> Grid:
    """``one`` where it is better, group by group."""
    scale_OG = one.scale_OG.where(one_is_better_OG, other.scale_OG)
    zero_OG = None
    if one.zero_point_OG is not None and other.zero_point_OG is not None:
        zero_OG = one.zero_point_OG.where(one_is_better_OG, other.zero_point_OG)
    return replace(one, scale_OG=scale_OG, zero_point_OG=zero_OG)
