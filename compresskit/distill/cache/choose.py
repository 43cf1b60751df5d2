"""From what a recipe says to a ``Keep``."""

from __future__ import annotations

from typing import Any

import torch

from compresskit.distill.cache.hidden import HiddenStates
from compresskit.distill.cache.keep import Keep
from compresskit.distill.cache.sampled import Sampled
from compresskit.distill.cache.top_k import TopK
from compresskit.distill.placements.cache import HIDDEN, MODEL, SAMPLED
from compresskit.modeling import ModelSource


def keep_of(
    teacher: ModelSource, vocabulary: int, temperature: float, *, keep: str, k: int, precision: str
) -> Keep:
    """What to keep of each token.

    Args:
        teacher: opened.
        vocabulary: ids it shares with the student.
        temperature: of distributions.
        keep, k, precision: of ``compresskit.distill.placements.cache.Cache``.
    """
    if keep == HIDDEN:
        computed = teacher.compute_dtype
        stored = computed if precision == MODEL else torch.bfloat16
        width = teacher.shape(f"{teacher.anatomy.head}.weight")[1]
        return HiddenStates(width=width, stored=stored, computed=computed)
    shared: dict[str, Any] = {"vocabulary": vocabulary, "temperature": temperature}
    return Sampled(draws=k, **shared) if keep == SAMPLED else TopK(k=k, **shared)
