"""A teacher that no process holds whole, whatever the engine of its student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.errors import PlanError
from compresskit.modeling import ModelSource
from compresskit.modeling.forwards import keeping
from compresskit.modeling.skeleton import resolve_dtype
from compresskit.training.beginning import identity_of
from compresskit.training.division import divided, whole
from compresskit.training.isolation import isolation_fault, sees_across
from compresskit.training.objective import Head, Hidden, Signal, head_of


@dataclass(frozen=True, kw_only=True)
class Divided:
    """The teacher in equal shares, read when the ranks first need it: before, they cannot talk.

    Attributes:
        directory: of the teacher's checkpoint.
        vocabulary: how many ids it shares with the student; its projection is cut to them.
        trust_remote_code: whether code in the directory may run.
        blocks: whose output a feature loss compares, counted from 0.
        dtype: of its weights; ``auto`` is what they are stored in.
        isolated: whether documents packed into one row must not see each other.
        offload: whether shares are kept on the CPU.
    """

    directory: str
    vocabulary: int
    trust_remote_code: bool = False
    blocks: Sequence[int] = ()
    dtype: str = "auto"
    isolated: bool = True
    offload: bool = False

    hidden = None
    """Whether documents see each other is tried when the weights are there."""

    @property
    def identity(self) -> str:
        """See ``Known``."""
        return identity_of(self, beside=("offload",))

    @cached_property
    def _source(self) -> ModelSource:
        return ModelSource(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _homes(self) -> dict[torch.device, nn.Module]:
        """The model, once there is one."""
        return {}

    def load(self) -> None:
        """Look at the checkpoint; weights are read at the first batch."""
        _ = self._source

    def model(self, device: torch.device) -> nn.Module:
        """This rank's share of the model, on ``device``; all ranks ask together.

        Raises:
            PlanError: documents packed into a row see each other.
        """
        if device not in self._homes:
            dtype = resolve_dtype(self.dtype) or self._source.compute_dtype
            model = divided(self._source, device, dtype, offload=self.offload)
            self._homes[device] = model

            def hidden(ids: Tensor, positions: Tensor) -> Tensor:
                return _states(model, ids.to(device), positions.to(device))

            if self.isolated and sees_across(hidden):
                raise PlanError(isolation_fault("teacher", type(self._source.config).__name__))
        return self._homes[device]

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """Hidden states (B, T, E) for ``input_ids`` and ``position_ids``, each int64 (B, T); a collective.

        The head is whole for as long as the signal is alive.
        """
        ids = inputs["input_ids"]
        model = self.model(ids.device)
        blocks = [model.get_submodule(self._source.anatomy.blocks[block]) for block in self.blocks]
        with keeping(blocks) as kept:
            states = _states(model, ids, inputs["position_ids"])
        own = head_of(model)
        bias = None if own.bias_V is None else whole(own.bias_V)
        head = Head(whole(own.weight_VD), bias, own.softcap).cut(self.vocabulary)
        return Signal(Hidden(states, head), tuple(kept[block] for block in blocks))


def _states(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    base: Any = model.base_model
    with torch.no_grad():
        states: Tensor = base(input_ids=ids, position_ids=positions, use_cache=False)[0]
    return states
