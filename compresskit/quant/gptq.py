"""GPTQ: round input by input, and let the inputs still to come make up for what each rounding changed.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, https://arxiv.org/abs/2210.17323. A weight that is
zero stays zero and its neighbours make up for that too, as in Frantar & Alistarh, "SparseGPT", 2023,
https://arxiv.org/abs/2301.00774, section 3.5: one pass, one Hessian, for both.

Shapes: O = out_features, I = in_features, B = inputs of the smallest block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.sweep import LARGEST_DAMPING, Change, inverse_factor, raised, sweep
from compresskit.formats.grid import Grid
from compresskit.options import Within
from compresskit.quant.affine import grid_for, least_error_grid
from compresskit.quant.base import Quantized
from compresskit.quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """One-shot quantisation that minimises the change of a layer's output on calibration data.

    Attributes:
        damping: added to the Hessian's diagonal, as a fraction of its mean. Raised tenfold, up to 1, for as
            long as the Hessian has no Cholesky factor; the layer's record says so.
        activation_order: round the inputs with the largest activations first. Groups stay as they are, so
            that the result needs no index of groups.
        search_range: choose each group's range for the least rounding error, weighted by its inputs, instead
            of covering all of it; not for e4m3, whose steps grow with the weights.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})

    damping: Annotated[float, Within(0, LARGEST_DAMPING)] = 0.01
    activation_order: bool = True
    search_range: bool = True

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats) -> Quantized:
        """Quantise one linear layer; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            scheme: bits and groups.
            stats: must hold ``input_gram_II``: float32 (I, I), squared activation units.

        Returns:
            The weight (O, I) on its grid, in ``weight_OI``'s dtype. Zeros stay exactly zero. Inputs that were
            always zero are rounded to nearest.

        Raises:
            StatisticError: the Gram matrix is missing, misshapen, not finite or zero, or has no Cholesky
                factor however it is damped.
            SchemeError: the group size does not divide I, or a weight is not finite.
        """
        gram_II = stats.require("input_gram", weight_OI.shape[1])
        importance_I = gram_II.diagonal()
        if self.search_range and scheme.number != "float":
            grid = least_error_grid(weight_OI, scheme, importance_I)
        else:
            grid = grid_for(weight_OI, scheme)
        order_I = torch.arange(len(importance_I), device=gram_II.device)
        if self.activation_order:
            order_I = importance_I.argsort(descending=True, stable=True)
        key = ("gptq", self.damping, self.activation_order)
        if key not in stats.shared:
            stats.shared[key] = inverse_factor(gram_II, self.damping, order_I=order_I, layer=stats.layer)
        factor_II, damping = stats.shared[key]
        new_OI = _round_in_order(weight_OI, grid, order_I, factor_II)
        return Quantized(weight_OI=new_OI, grid=grid, note=raised(self.damping, damping))


def _round_in_order(weight_OI: Tensor, grid: Grid, order_I: Tensor, factor_II: Tensor) -> Tensor:
    """The rounded weight (O, I): each input in turn, its error spread over those that follow."""
    new_OI = torch.empty_like(weight_OI)
    places = order_I.tolist()

    def begin(start: int, stop: int) -> Change:
        rounders = _rounders(grid, places[start:stop])
        keep_BO = weight_OI.t()[order_I[start:stop]] != 0
        if bool(keep_BO.all()):
            return lambda at, left_O: rounders[at - start](left_O)
        return lambda at, left_O: rounders[at - start](left_O).where(keep_BO[at - start], 0)

    def end(start: int, stop: int, new_BO: Tensor) -> None:
        new_OI[:, order_I[start:stop]] = new_BO.t().to(new_OI.dtype)

    sweep(weight_OI.t()[order_I].float(), factor_II, begin, end)
    return new_OI


def _rounders(grid: Grid, places: list[int]) -> list[Callable[[Tensor], Tensor]]:
    """For each input a function that rounds a column (O,) of float32 to the value ``grid`` has for it."""
    if grid.number != "int":
        return [partial(_snap, grid.columns(place, place + 1)) for place in places]
    groups = [0 if grid.group_size is None else place // grid.group_size for place in places]
    scale_BO = grid.scale_OG.t()[groups].float()
    zero_BO = None if grid.zero_point_OG is None else grid.zero_point_OG.t()[groups].float()
    half, dtype = 2 ** (grid.bits - 1), grid.scale_OG.dtype

    def rounded(at: int, column_O: Tensor) -> Tensor:
        zero_O = 0 if zero_BO is None else zero_BO[at]
        level_O = (column_O / scale_BO[at]).round_().clamp_(-half - zero_O, half - 1 - zero_O)
        # The product of two numbers of few bits is exact in float32, so this rounds once, as Grid does.
        return level_O.mul_(scale_BO[at]).to(dtype).float()

    return [partial(rounded, at) for at in range(len(places))]


def _snap(grid: Grid, column_O: Tensor) -> Tensor:
    return grid.snap(column_O.unsqueeze(1)).squeeze(1).float()
