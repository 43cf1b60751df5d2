"""A teacher of sentences: a replica of the whole model in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.distill.teacher import frozen
from compresskit.training.beginning import identity_of
from compresskit.training.features import Looks, Watched, looking_at, watched_in
from compresskit.training.objective import Classified, Embedded, Signal
from compresskit.training.sentences import LOGITS, STATES, read_by


@dataclass(frozen=True, kw_only=True)
class SentenceReplica:
    """The whole teacher in its own dtype, never trained, never wrapped, moved to where the batches are.

    Attributes:
        directory: of the teacher's checkpoint.
        reads: what of it is learnt: ``states`` of its last block, or ``logits`` of classes.
        trust_remote_code: whether code in the directory may run.
        blocks: whose output a feature loss compares, counted from 0.
        attended: blocks of which it compares what their attention is given.
    """

    directory: str
    reads: str = STATES
    trust_remote_code: bool = False
    blocks: Sequence[int] = ()
    attended: Sequence[int] = ()

    @property
    def identity(self) -> str:
        """See ``Known``."""
        return identity_of(self)

    @cached_property
    def _model(self) -> nn.Module:
        return frozen(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _watched(self) -> Watched:
        return watched_in(self._model, Looks(tuple(self.blocks), tuple(self.attended)))

    def load(self) -> None:
        """Read the weights now, before an engine would shard them."""
        _ = self._watched  # names of blocks are found by the shapes of weights

    @property
    def hidden(self) -> None:
        """None: there are no documents packed into one row that it could mix up."""

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """What it makes of ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, each (S, T)."""
        model: Any = self._model.to(inputs["input_ids"].device)
        read = model if self.reads == LOGITS else model.base_model
        with torch.no_grad(), looking_at(self._watched) as seen:
            made = read_by(read, self.reads, inputs)
        says = Classified(made) if self.reads == LOGITS else Embedded(made)
        return Signal(says, seen())
