"""GPTQ: round input by input, and let the inputs still to come make up for what each rounding changed.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, https://arxiv.org/abs/2210.17323. A weight that is
zero stays zero and its neighbours make up for that too, as in Frantar & Alistarh, "SparseGPT", 2023,
https://arxiv.org/abs/2301.00774, section 3.5: one pass, one Hessian, for both.

Errors are spread block by block, and blocks are halves of blocks: nearly all work is in large products.

Shapes: O = out_features, I = in_features, B = inputs of the smallest block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import Fault, StatisticError
from compresskit.formats.grid import Grid
from compresskit.options import Within
from compresskit.quant.affine import grid_for, least_error_grid
from compresskit.quant.base import Quantized
from compresskit.quant.scheme import Scheme

RAISE = 10.0
LARGEST_DAMPING = 1.0
LEAF = 32
"""Inputs of a block that is not halved again."""
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
        if not bool((importance_I > 0).any()):
            got = "zero for every token"
            raise StatisticError(
                Fault(stats.layer or "layer", "inputs to measure", got, "Add the layer to ignore.")
            )
        if self.search_range and scheme.number != "float":
            grid = least_error_grid(weight_OI, scheme, importance_I)
        else:
            grid = grid_for(weight_OI, scheme)
        order_I = torch.arange(len(importance_I), device=gram_II.device)
        if self.activation_order:
            order_I = importance_I.argsort(descending=True, stable=True)
        key = ("gptq", self.damping, self.activation_order)
        if key not in stats.shared:
            stats.shared[key] = _inverse_factor(gram_II, order_I, self.damping, stats.layer)
        factor_II, damping = stats.shared[key]
        new_OI = _round_in_order(weight_OI, grid, order_I, factor_II)
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


def _round_in_order(weight_OI: Tensor, grid: Grid, order_I: Tensor, factor_II: Tensor) -> Tensor:
    """The rounded weight (O, I): each input in turn, its error spread over those that follow."""
    left_IO = weight_OI.t()[order_I].float()
    new_OI = torch.empty_like(weight_OI)
    places = order_I.tolist()

    def leaf(start: int, stop: int) -> None:
        rounders = _rounders(grid, places[start:stop])
        here_B = order_I[start:stop]
        keep_BO = weight_OI.t()[here_B] != 0
        is_dense = bool(keep_BO.all())
        new_BO = left_IO.new_empty(stop - start, left_IO.shape[1])
        for at, rounded in enumerate(rounders, start):
            rounded_O = rounded(left_IO[at])
            if not is_dense:
                rounded_O = rounded_O.where(keep_BO[at - start], 0)
            new_BO[at - start] = rounded_O
            # From here on the row holds the error, which is all that later inputs want of it.
            left_IO[at].sub_(rounded_O).div_(factor_II[at, at])
            left_IO[at + 1 : stop].addr_(factor_II[at, at + 1 : stop], left_IO[at], alpha=-1)
        new_OI[:, here_B] = new_BO.t().to(new_OI.dtype)

    for start, middle, stop in _halves(0, len(places)):
        if middle == stop:
            leaf(start, stop)
        else:
            factor_BB = factor_II[start:middle, middle:stop]
            left_IO[middle:stop].addmm_(factor_BB.t(), left_IO[start:middle], alpha=-1)
    return new_OI


def _halves(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The leaves (start, stop, stop) in order, and (start, middle, stop) between the halves of each range.

    Not a function within the one that rounds: calling itself, it would keep that one's tensors in a cycle.
    """
    if stop - start <= LEAF:
        yield start, stop, stop
        return
    middle = start + (stop - start + 1) // 2
    yield from _halves(start, middle)
    yield start, middle, stop
    yield from _halves(middle, stop)


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
