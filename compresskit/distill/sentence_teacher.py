"""A teacher of sentences: a replica of the whole model in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.modeling import load_model
from compresskit.training.features import OUTPUT, compared_blocks, looking_at
from compresskit.training.objective import Classified, Embedded, Signal
from compresskit.training.sentences import LOGITS, STATES, read_by


@dataclass(frozen=True, kw_only=True)
class SentenceReplica:
    """The whole teacher in its own dtype, never trained, never wrapped, moved to where the batches are.

    Attributes:
        directory: of the teacher's checkpoint.
        reads: what of it is learnt: ``states`` of its last block, or ``logits`` of classes.
        trust_remote_code: whether code in the directory may run.
        blocks: which a feature loss compares, counted from 0.
        takes: what of them: their ``output``, or what their ``attention`` is given.
    """

    directory: str
    reads: str = STATES
    trust_remote_code: bool = False
    blocks: Sequence[int] = ()
    takes: str = OUTPUT

    @cached_property
    def _model(self) -> nn.Module:
        model: Any = load_model(Path(self.directory), trust_remote_code=self.trust_remote_code)
        frozen: nn.Module = model.eval().requires_grad_(False)
        return frozen

    @cached_property
    def _blocks(self) -> tuple[nn.Module, ...]:
        return compared_blocks(self._model, self.blocks)

    def load(self) -> None:
        """Read the weights now, before an engine would shard them."""
        _ = self._blocks  # whose names are found by the shapes of weights

    @property
    def hidden(self) -> None:
        """None: there are no documents packed into one row that it could mix up."""

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """What it makes of ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, each (S, T)."""
        model: Any = self._model.to(inputs["input_ids"].device)
        read = model if self.reads == LOGITS else model.base_model
        with torch.no_grad(), looking_at(self._blocks, self.takes) as kept:
            made = read_by(read, self.reads, inputs)
        says = Classified(made) if self.reads == LOGITS else Embedded(made)
        return Signal(says, tuple(kept[block] for block in self._blocks))
