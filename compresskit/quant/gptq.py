"""GPTQ: round input by input, and let the inputs still to come make up for what each rounding changed.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, https://arxiv.org/abs/2210.17323. A weight that is
zero stays zero and its neighbours make up for that too, as in Frantar & Alistarh, "SparseGPT", 2023,
https://arxiv.org/abs/2301.00774, section 3.5: one pass, one Hessian, for both.

Shapes: O = out_features, I = in_features, B = inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import Fault, StatisticError
from compresskit.formats.grid import Grid
from compresskit.quant.affine import grid_for, least_error_grid
from compresskit.quant.base import Quantized
from compresskit.quant.scheme import Scheme

RAISE = 10.0
LARGEST_DAMPING = 1.0
CHUNK = 512
"""Rows of the Gram matrix that are put in order at a time: nothing of its size is made but the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """One-shot quantisation that minimises the change of a layer's output on calibration data.

    Attributes:
        damping: added to the Hessian's diagonal, as a fraction of its mean. Raised tenfold, up to 1, for as
            long as the Hessian has no Cholesky factor; the layer's record says so.
        activation_order: round the inputs with the largest activations first. Groups stay as they are, so
            that the result needs no index of groups.
        block_size: inputs whose changes are passed on together.
        search_range: choose each group's range for the least rounding error, weighted by its inputs, instead
            of covering all of it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})

    damping: float = 0.01
    activation_order: bool = True
    block_size: int = 128
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
        if not bool((importance_I > 0).any()):
            got = "zero for every token"
            raise StatisticError(
                Fault(stats.layer or "layer", "inputs to measure", got, "Add the layer to ignore.")
            )
        if self.search_range:
            grid = least_error_grid(weight_OI, scheme, importance_I)
        else:
            grid = grid_for(weight_OI, scheme)
        order_I = torch.arange(len(importance_I), device=gram_II.device)
        if self.activation_order:
            order_I = importance_I.argsort(descending=True, stable=True)
        factor_II, damping = _inverse_factor(gram_II, order_I, self.damping, stats.layer)
        new_OI = _round_in_order(weight_OI, grid, order_I, factor_II, self.block_size)
        raised = damping > self.damping
        note = f"damping raised from {self.damping:g} to {damping:g}" if raised else ""
        return Quantized(weight_OI=new_OI, grid=grid, note=note)


def _inverse_factor(gram_II: Tensor, order_I: Tensor, damping: float, layer: str) -> tuple[Tensor, float]:
    """The upper Cholesky factor (I, I) of the damped Hessian's inverse in ``order_I``, and its damping."""
    diagonal_I = gram_II.diagonal()
    mean = float(diagonal_I[diagonal_I > 0].mean())
    # An input that was always zero gets the mean: it is tied to no other, so nothing is passed on.
    dead_I = diagonal_I[order_I] == 0
    info = torch.empty((), dtype=torch.int32, device=gram_II.device)
    work_II = torch.empty_like(gram_II).mT  # columns first, as LAPACK has it, which then works in place
    while damping <= LARGEST_DAMPING:
        for start in range(0, len(order_I), CHUNK):
            rows = slice(start, start + CHUNK)
            work_II[:, rows] = gram_II[order_I[rows]].index_select(1, order_I).mT
        work_II.diagonal().add_(dead_I * mean + damping * mean)
        torch.linalg.cholesky_ex(work_II, out=(work_II, info))
        if not info:
            torch.cholesky_inverse(work_II, out=work_II)
            torch.linalg.cholesky_ex(work_II, upper=True, out=(work_II, info))
            if not info and bool(work_II.diagonal().isfinite().all()):
                return work_II, damping
        damping = max(damping * RAISE, 1e-4)
    cure = "Give more calibration rows, or quantise this layer with rtn."
    got = f"none with a damping up to {LARGEST_DAMPING:g}"
    raise StatisticError(Fault(layer or "layer", "a Hessian with a Cholesky factor", got, cure))


def _round_in_order(
    weight_OI: Tensor, grid: Grid, order_I: Tensor, factor_II: Tensor, block_size: int
) -> Tensor:
    """The rounded weight (O, I): each input in turn, its error spread over those that follow."""
    inputs = weight_OI.shape[1]
    left_OI = weight_OI[:, order_I].float()
    keep_OI = left_OI != 0
    new_OI = torch.empty_like(weight_OI)
    places = order_I.tolist()
    for start in range(0, inputs, block_size):
        stop = min(start + block_size, inputs)
        block_BO = left_OI[:, start:stop].t().contiguous()
        error_BO = torch.empty_like(block_BO)
        factor_BB = factor_II[start:stop, start:stop]
        for at, place in enumerate(places[start:stop]):
            column_O = block_BO[at]
            rounded_O = grid.columns(place, place + 1).snap(column_O.unsqueeze(1)).squeeze(1)
            rounded_O = rounded_O.where(keep_OI[:, start + at], 0)
            new_OI[:, place] = rounded_O
            error_BO[at] = (column_O - rounded_O) / factor_BB[at, at]
            block_BO[at + 1 :].addr_(factor_BB[at, at + 1 :], error_BO[at], alpha=-1)
        left_OI[:, stop:].addmm_(error_BO.t(), factor_II[start:stop, stop:], alpha=-1)
    return new_OI
