"""Change a weight input by input, and let the inputs still to come make up for each change.

What GPTQ and SparseGPT have in common, who differ in what they make of an input.

Papers: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, https://arxiv.org/abs/2210.17323; Frantar & Alistarh, "SparseGPT:
Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, https://arxiv.org/abs/2301.00774.

Errors are spread block by block, and blocks are halves of blocks: nearly all work is in large products.

Shapes: O = out_features, I = in_features, B = inputs of the smallest block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compresskit.errors import Fault, StatisticError

RAISE = 10.0
LARGEST_DAMPING = 1.0
LEAF = 32
"""Inputs of a block that is not halved again."""
CHUNK = 512
"""Rows of the Gram matrix that are put in order at a time: nothing of its size is made but the result."""

Change = Callable[[int, Tensor], Tensor]
"""``change(at, left_O)`` returns what becomes of input ``at``, which until then is ``left_O``, both (O,)."""


def inverse_factor(
    gram_II: Tensor, damping: float, *, order_I: Tensor | None = None, layer: str = ""
) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped Hessian's inverse.

    Args:
        gram_II: float32 (I, I), the mean of x_i x_j; not changed.
        damping: added to its diagonal, as a fraction of the mean of what is positive there. Raised tenfold,
            up to 1, for as long as there is no factor.
        order_I: the order of the inputs; None is their own.
        layer: its name, for errors.

    Returns:
        The factor (I, I) in that order, and the damping used.

    Raises:
        StatisticError: the matrix is zero, or has no factor however it is damped.
    """
    diagonal_I, mean = gram_II.diagonal(), mean_square(gram_II, layer)
    if order_I is None:
        order_I = torch.arange(len(diagonal_I), device=gram_II.device)
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
    cure = "Give more calibration rows, or choose a method that needs no inverse for this layer."
    got = f"none with a damping up to {LARGEST_DAMPING:g}"
    raise StatisticError(Fault(layer or "layer", "a Hessian with a Cholesky factor", got, cure))


def mean_square(gram_II: Tensor, layer: str) -> float:
    """The mean of what is positive on the diagonal: what damping is a fraction of.

    Raises:
        StatisticError: nothing is; every input was zero for every token.
    """
    diagonal_I = gram_II.diagonal()
    if not bool((diagonal_I > 0).any()):
        cure = "Add the layer to ignore."
        raise StatisticError(Fault(layer or "layer", "inputs to measure", "zero for every token", cure))
    return float(diagonal_I[diagonal_I > 0].mean())


def raised(damping: float, used: float) -> str:
    """A sentence for a layer's record where ``used`` is more than the ``damping`` asked for."""
    return f"damping raised from {damping:g} to {used:g}" if used > damping else ""


def sweep(
    left_IO: Tensor,
    factor_II: Tensor,
    begin: Callable[[int, int], Change],
    end: Callable[[int, int, Tensor], None],
    *,
    unit: int = 1,
) -> None:
    """Change each input in turn, and spread its error over those that follow.

    Args:
        left_IO: float32 (I, O), the weight in the factor's order; used up.
        factor_II: of :func:`inverse_factor`.
        begin: ``begin(start, stop)`` is called before inputs ``start`` to ``stop`` are changed; returns how.
        end: ``end(start, stop, new_BO)`` is given what became of them.
        unit: when the first of each ``unit`` inputs is changed, all that came before has been spread over the
            rest of them in ``left_IO``, which may be read.
    """
    for start, middle, stop in _halves(0, len(left_IO), unit):
        if middle == stop:
            change = begin(start, stop)
            new_BO = left_IO.new_empty(stop - start, left_IO.shape[1])
            for at in range(start, stop):
                new_O = new_BO[at - start].copy_(change(at, left_IO[at]))
                # From here on the row holds the error, which is all that later inputs want of it.
                left_IO[at].sub_(new_O).div_(factor_II[at, at])
                left_IO[at + 1 : stop].addr_(factor_II[at, at + 1 : stop], left_IO[at], alpha=-1)
            end(start, stop, new_BO)
        else:
            factor_BB = factor_II[start:middle, middle:stop]
            left_IO[middle:stop].addmm_(factor_BB.t(), left_IO[start:middle], alpha=-1)


def _halves(start: int, stop: int, unit: int) -> Iterator[tuple[int, int, int]]:
    """The leaves (start, stop, stop) in order, and (start, middle, stop) between the halves of each range.

    A range of more than a unit is halved between units. Not a function within the one that sweeps: calling
    itself, it would keep that one's tensors in a cycle.
    """
    size = stop - start
    if size <= LEAF:
        yield start, stop, stop
        return
    step = unit if size > unit else 1
    middle = start + -(-size // (2 * step)) * step
    yield from _halves(start, middle, unit)
    yield start, middle, stop
    yield from _halves(middle, stop, unit)
