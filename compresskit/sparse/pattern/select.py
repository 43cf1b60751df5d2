"""The smallest of many scores. G = groups, M = members of a group."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64
CHUNK = 1 << 22
CHUNK_OF_FEW = 1 << 19


def smallest(score: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest along the last dimension; of equal ones the first, on any device."""
    few = score.shape[-1] <= FEW
    mark, chunk = (_smallest_of_few, CHUNK_OF_FEW) if few else (_smallest_of_many, CHUNK)
    if score.dim() == 1 or score.numel() <= chunk:
        return mark(score, count)
    # Keeps what selecting needs besides small, and groups within the processor's cache.
    rows = max(1, chunk * len(score) // score.numel())
    return torch.cat([mark(part, count) for part in torch.split(score, rows)])


def _smallest_of_few(score: Tensor, count: int) -> Tensor:
    """By rank: how many are smaller, or equal and before it; for groups faster than selecting in each.

    Every two members are compared once, for all groups at a time: members first, so that the groups lie
    side by side.
    """
    score_MG = score.reshape(-1, score.shape[-1]).t().contiguous()
    rank_MG = torch.zeros(score_MG.shape, dtype=torch.int8, device=score.device)
    for j in range(len(score_MG) - 1):
        smaller = score_MG[j + 1 :] < score_MG[j]
        rank_MG[j] += smaller.sum(0, dtype=torch.int8)
        rank_MG[j + 1 :] += smaller.logical_not_()
    return (rank_MG < count).t().reshape(score.shape)


def _smallest_of_many(score: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = score < threshold, score == threshold
    still = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= still))
