"""Of each token the teacher's hidden state before its output projection: nothing about the ids is lost.

Small beside distributions, and the projection alone is loaded to train with it.

Shapes: N = supervised tokens, E = teacher's hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresskit.distill.cache.keep import Columns, Lay
from compresskit.training.objective import Head, Hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """A ``Keep``.

    Attributes:
        width: E.
        stored: the type on disk.
        computed: the type the teacher computes in, which the states have again when they are read.
    """

    entry_columns: ClassVar[tuple[str, ...]] = ()

    width: int
    stored: torch.dtype
    computed: torch.dtype

    def most_bytes(self) -> int:
        """See ``Keep``."""
        return self.width * self.stored.itemsize

    def columns(self, hidden_NE: Tensor, head: Head, tokens: Sequence[int], seeds: Sequence[int]) -> Columns:
        """See ``Keep``: ``states`` (N, E)."""
        return {"states": hidden_NE.to(self.stored).cpu()}

    def says(self, columns: Columns, lay: Lay, head: Head | None) -> Hidden:
        """See ``Keep``."""
        assert head is not None
        return Hidden(lay(columns["states"].to(self.computed)), head)
