"""A replica of the whole teacher in every process that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.modeling import load_model
from compresskit.modeling.skeleton import resolve_dtype
from compresskit.training.beginning import identity_of
from compresskit.training.features import Looks, Watched, looking_at, watched_in
from compresskit.training.objective import Head, Hidden, Signal, head_of


def frozen(directory: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """The whole model of a checkpoint, in evaluation mode, none of whose weights takes a gradient.

    Args:
        directory: of the checkpoint.
        dtype: of its weights; ``auto`` is what they are stored in.
        trust_remote_code: whether code in the directory may run.
    """
    wanted = resolve_dtype(dtype) or "auto"
    model: nn.Module = load_model(Path(directory), dtype=wanted, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The whole teacher, never trained, never wrapped, moved to where the batches are.

    Attributes:
        directory: of the teacher's checkpoint.
        vocabulary: how many ids it shares with the student; its projection is cut to them.
        trust_remote_code: whether code in the directory may run.
        blocks: whose output a feature loss compares, counted from 0.
        attended: blocks of which it compares what their attention is given.
        dtype: of its weights; ``auto`` is what they are stored in.
    """

    directory: str
    vocabulary: int
    trust_remote_code: bool = False
    blocks: Sequence[int] = ()
    attended: Sequence[int] = ()
    dtype: str = "auto"

    @property
    def identity(self) -> str:
        """See ``Known``."""
        return identity_of(self)

    @cached_property
    def _model(self) -> nn.Module:
        return frozen(self.directory, dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _watched(self) -> Watched:
        return watched_in(self._model, Looks(tuple(self.blocks), tuple(self.attended)))

    def load(self) -> None:
        """Read the weights now, before an engine would shard them."""
        self._head()
        _ = self._watched  # names of blocks are found by the shapes of weights

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (B, T, E) for token ids and their positions, each int64 (B, T)."""
        base: Any = self._model.to(ids.device).base_model
        with torch.no_grad():
            states: Tensor = base(input_ids=ids, position_ids=positions, use_cache=False)[0]
        return states

    def _head(self) -> Head:
        """Its output projection onto the shared ids."""
        return head_of(self._model).cut(self.vocabulary)

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """Hidden states (B, T, E) for ``input_ids`` and ``position_ids``, each int64 (B, T)."""
        ids = inputs["input_ids"]
        with looking_at(self._watched) as seen:
            hidden = self.hidden(ids, inputs["position_ids"])
        return Signal(Hidden(hidden, self._head()), seen())
