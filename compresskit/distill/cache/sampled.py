"""Of each token ids drawn from the teacher's distribution, and how often each was drawn.

The share of the draws stands for the probability. Its mean over draws is the probability itself, so a loss
whose gradient is linear in the teacher's probabilities has the right gradient on average; the likeliest ids
alone would teach a student that the others do not exist.

Paper: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025,
https://arxiv.org/abs/2503.16870 (with the teacher's own distribution as the one to draw from).

Shapes: N = supervised tokens, S = draws of a token, K = most different ids of a token, M = different ids of
all tokens, V = vocabulary, E = teacher's hidden width.
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

MOST_DRAWS = (1 << 16) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A ``Keep``: ids in two bytes or four, counts in one or two.

    Attributes:
        draws: S, at most 65,535.
        vocabulary: V.
        temperature: of the distributions.
    """

    entry_columns: ClassVar[tuple[str, ...]] = ("ids", "counts")

    draws: int
    vocabulary: int
    temperature: float

    def most_bytes(self) -> int:
        """See ``Keep``: no id was drawn twice."""
        each = ids_type(self.vocabulary).itemsize + self._counts.itemsize
        return torch.uint16.itemsize + min(self.draws, self.vocabulary) * each

    @property
    def _counts(self) -> torch.dtype:
        return torch.uint8 if self.draws < 1 << 8 else torch.uint16

    def columns(self, hidden_NE: Tensor, head: Head, tokens: Sequence[int], seeds: Sequence[int]) -> Columns:
        """See ``Keep``: ``entries`` (N,), and ``ids`` and ``counts`` (M,); each row has draws of its own."""
        made, device = [], hidden_NE.device
        for states_NE, seed in zip(torch.split(hidden_NE, list(tokens)), seeds, strict=True):
            generator = torch.Generator(device).manual_seed(seed)
            target = projected(states_NE, head)
            for said in told(target, len(states_NE), self.temperature, device.type):
                p_CV = said.log_p_CO.exp()
                drawn_CS = torch.multinomial(p_CV, self.draws, replacement=True, generator=generator)
                made.append(self._counted(drawn_CS.cpu()))
        return joined(made)

    def _counted(self, drawn_CS: Tensor) -> Columns:
        ordered_CS = drawn_CS.sort(-1).values
        first_CS = torch.ones_like(ordered_CS, dtype=torch.bool)
        first_CS[:, 1:] = ordered_CS[:, 1:] != ordered_CS[:, :-1]
        begins_M = first_CS.flatten().nonzero()[:, 0]
        counts_M = begins_M.diff(append=begins_M.new_tensor([first_CS.numel()]))
        return {
            "entries": first_CS.sum(-1).to(torch.uint16),
            "ids": ordered_CS[first_CS].to(ids_type(self.vocabulary)),
            "counts": counts_M.to(self._counts),
        }

    def says(self, columns: Columns, lay: Lay, head: Head | None) -> Listing:
        """See ``Keep``; tokens with fewer ids are filled up with some that have no probability."""
        entries_N = columns["entries"].long()
        keep_NK = torch.arange(max(entries_N.tolist(), default=1)) < entries_N[:, None]
        ids_NK = torch.zeros(keep_NK.shape, dtype=torch.int64)
        ids_NK[keep_NK] = columns["ids"].long()
        share_NK = torch.zeros(keep_NK.shape)
        share_NK[keep_NK] = columns["counts"].float() / self.draws
        return Listing(lay(ids_NK), lay(share_NK.log()), self.vocabulary, self.temperature)
