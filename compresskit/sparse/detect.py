"""Which pattern the zeros of a weight really have, whoever made them and whatever was promised.

A pattern is named if it holds in every group, and only if zeros thrown anywhere would hardly hold it: where
nine of ten weights are zero, two of four mostly are. What a quantiser rounded to zero besides does no harm.

Shapes: O = out_features, I = in_features, G = groups of M inputs in a row, B = blocks along a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb, log1p

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.limits import ZeroLayout

LARGEST_GROUP = 32
LARGEST_BLOCK = 128
BY_CHANCE = -7.0  # log of a thousandth: what zeros thrown anywhere hold more often is no pattern
FULL = 0.1  # of all groups, that keep as many as they may; a broken 2:4 is a 5:8 with hardly a full group
SCATTERED = 0.2  # of zeros outside zero blocks, at most: a quantiser rounds some more weights to zero


def detect(zero_OI: Tensor) -> ZeroLayout:
    """Find out how the zeros of one layer lie.

    Args:
        zero_OI: bool (O, I), True where the weight is zero; not modified.

    Returns:
        The layout. Of several that hold, blocks come first, since they hold the others too; then the N:M that
        chance explains least (2:4 before the 4:8 that it is as well); then rows of equally many zeros.
        Groups have at most 32 inputs; blocks sides that are powers of two, at most 128, or a whole row or
        column. The last block of a row or column may be short, and so may the last group of a row where M is
        a power of two.
    """
    total = int(zero_OI.sum())
    fraction = total / zero_OI.numel() if zero_OI.numel() else 0.0
    if not total:
        return ZeroLayout(zero_fraction=0.0)
    if found := _blocks(zero_OI, total):
        block, block_fraction = found
        return ZeroLayout(zero_fraction=fraction, block=block, block_fraction=block_fraction)
    if group := _group(zero_OI, fraction):
        return ZeroLayout(zero_fraction=fraction, group=group)
    count_O = zero_OI.sum(1)
    even = len(count_O) > 1 and bool((count_O == count_O[0]).all())
    return ZeroLayout(zero_fraction=fraction, even=even)


def _group(zero_OI: Tensor, fraction: float) -> tuple[int, int] | None:
    """The (N, M) that chance explains least; None if it explains them all."""
    best, least = None, BY_CHANCE
    counted: dict[int, Tensor] = {1: zero_OI.to(torch.uint8)}
    for of in range(2, min(LARGEST_GROUP, zero_OI.shape[1] - 1) + 1):
        if zero_OI.shape[1] % of and of & (of - 1):
            continue
        step = next(n for n in range(of - 1, 0, -1) if of % n == 0 and n in counted)
        parts_OG = pad(counted[step], (0, -counted[step].shape[1] % (of // step)), value=step)
        zeros_OG = parts_OG[:, :: of // step].clone()
        for place in range(1, of // step):
            zeros_OG += parts_OG[:, place :: of // step]
        counted[of] = zeros_OG
        fewest = int(zeros_OG.min())
        # Where hardly a group has as many as it may, something broke a pattern of fewer.
        if not 0 < fewest < of or (zeros_OG == fewest).sum() < FULL * zeros_OG.numel():
            continue
        keep = of - fewest
        groups = len(zero_OI) * (zero_OI.shape[1] // of)
        chance = groups * log1p(-_exceeds(keep, of, 1 - fraction))
        if chance < least:
            best, least = (keep, of), chance
    return best


def _exceeds(keep: int, of: int, kept: float) -> float:
    """Probability that more than ``keep`` of ``of`` weights are kept, each with probability ``kept``."""
    return sum(comb(of, n) * kept**n * (1 - kept) ** (of - n) for n in range(keep + 1, of + 1))


def _blocks(zero_OI: Tensor, total: int) -> tuple[tuple[int, int], float] | None:
    """The largest blocks that nearly all zeros lie in, and the share of blocks that are zero."""
    fraction, best = total / zero_OI.numel(), None
    for (rows, columns), zero_BB in _pooled(zero_OI, total):
        area = rows * columns
        if best is not None and area <= best[0][0] * best[0][1]:
            continue
        # Of zeros thrown anywhere so many would have something else in their block.
        if _outside(zero_BB, (rows, columns), zero_OI, total) <= SCATTERED * (1 - fraction ** (area - 1)):
            best = (rows, columns), float(zero_BB.count_nonzero()) / zero_BB.numel()
    return best


def _outside(zero_BB: Tensor, size: tuple[int, int], zero_OI: Tensor, total: int) -> float:
    """Of ``total`` zeros the share that lies in no zero block of ``size``; blocks at the end may be short."""
    rows, columns = size
    below, beside = -zero_OI.shape[0] % rows, -zero_OI.shape[1] % columns
    inside = int(zero_BB.count_nonzero()) * rows * columns + int(zero_BB[-1, -1]) * below * beside
    inside -= int(zero_BB[-1].count_nonzero()) * below * columns
    inside -= int(zero_BB[:, -1].count_nonzero()) * beside * rows
    return 1 - inside / total


def _pooled(zero_OI: Tensor, total: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Sizes of blocks and which of them are zero; none larger than those that already leave too much out."""
    height, width = zero_OI.shape
    for size, zero in (((height, 1), zero_OI.all(0)[None]), ((1, width), zero_OI.all(1)[:, None])):
        if size[0] * size[1] > 1:
            yield size, zero
    tall, rows = zero_OI, 1
    while True:
        wide, columns = tall, 1
        while True:
            if rows * columns > 1:
                yield (rows, columns), wide
            if columns == LARGEST_BLOCK or 2 * columns > width:
                break
            wide, columns = _paired(wide.T).T, columns * 2
            if _outside(wide, (rows, columns), zero_OI, total) > SCATTERED:
                break
        if rows == LARGEST_BLOCK or 2 * rows > height:
            break
        tall, rows = _paired(tall), rows * 2
        if _outside(tall, (rows, 1), zero_OI, total) > SCATTERED:
            break


def _paired(zero_BB: Tensor) -> Tensor:
    """Every two blocks below each other as one; the last counts twice where it has none below it."""
    upper, lower = zero_BB[::2], zero_BB[1::2]
    return upper & (torch.cat([lower, upper[-1:]]) if len(zero_BB) % 2 else lower)
