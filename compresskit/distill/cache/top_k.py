"""Of each token the likeliest ids with their log-probabilities, and that of all others together.

Shapes: N = supervised tokens, K = ids kept of a token, V = vocabulary, E = teacher's hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresskit.distill.cache.keep import Columns, Lay, ids_type, joined, told
from compresskit.distill.divergences import projected
from compresskit.training.objective import Head, Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A ``Keep``: ids in two bytes or four, log-probabilities in float16.

    Attributes:
        k: at most so many ids.
        vocabulary: V.
        temperature: of the log-probabilities.
    """

    entry_columns: ClassVar[tuple[str, ...]] = ()

    k: int
    vocabulary: int
    temperature: float

    def most_bytes(self) -> int:
        """See ``Keep``."""
        ids = min(self.k, self.vocabulary)
        return ids * (ids_type(self.vocabulary).itemsize + 2) + 2 * (ids < self.vocabulary)

    def columns(self, hidden_NE: Tensor, head: Head, tokens: Sequence[int], seeds: Sequence[int]) -> Columns:
        """See ``Keep``: ``ids`` (N, K) and ``log_p``, (N, K) where these are all ids, else (N, K + 1)."""
        target, made = projected(hidden_NE, head), []
        for whole in told(target, len(hidden_NE), self.temperature, hidden_NE.device.type):
            said = whole.top(self.k)
            assert said.ids_CK is not None
            kept = said.ids_CK.shape[1]
            known = kept if kept == self.vocabulary else kept + 1
            log_p_CO = said.log_p_CO[:, :known].to(torch.float16).cpu()
            made.append({"ids": said.ids_CK.cpu().to(ids_type(self.vocabulary)), "log_p": log_p_CO})
        return joined(made)

    def says(self, columns: Columns, lay: Lay, head: Head | None) -> Listing:
        """See ``Keep``; what rounding took from the sum of probabilities is made up for."""
        log_p_NO = columns["log_p"].float().log_softmax(-1)
        return Listing(lay(columns["ids"].long()), lay(log_p_NO), self.vocabulary, self.temperature)
