"""Which rank has which stage of which pipeline, and who talks to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compresskit.training.access import Whole, copied, wanted
from compresskit.training.rules.asynchronous import BUCKET


@dataclass(frozen=True)
class Place:
    """A rank's place: pipelines lie side by side, the stages of one on consecutive ranks.

    Every rank makes its own at the same time, since groups are made together.

    Attributes:
        rank, ranks: of all.
        width: ranks of a pipeline; with several stages a rank, stage i is on rank i modulo ``width``.
    """

    rank: int
    ranks: int
    width: int
    _groups: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        heads = range(0, self.ranks, self.width)
        kinds = {
            "pipeline": [list(range(head, head + self.width)) for head in heads],
            "ends": [[head, head + self.width - 1] for head in heads],
            "alike": [list(range(at, self.ranks, self.width)) for at in range(self.width)],
        }
        for kind, lists in kinds.items():
            for members in lists:
                group = dist.new_group(members)
                if self.rank in members:
                    self._groups[kind] = group

    @property
    def at(self) -> int:
        """In its pipeline, from 0."""
        return self.rank % self.width

    @property
    def pipeline(self) -> int:
        """Which pipeline, from 0."""
        return self.rank // self.width

    @property
    def pipelines(self) -> int:
        """How many."""
        return self.ranks // self.width

    @property
    def is_end(self) -> bool:
        """Whether it has the first or the last stage."""
        return self.at in (0, self.width - 1)

    def group(self, kind: str) -> Any:
        """Of this rank: ``pipeline``, its first and last (``ends``), or the same place in all (``alike``)."""
        return self._groups[kind]

    def summed(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Sum tensors of one type over a group, in place."""
        if not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        for part in torch.split(flat, BUCKET):
            dist.all_reduce(part, group=self.group(kind))
        for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of the whole model's state dict.

    Attributes:
        owner: rank of the first pipeline that has it.
        shape, dtype: while it trains.
        trained: whether it takes a gradient.
    """

    owner: int
    shape: torch.Size
    dtype: torch.dtype
    trained: bool


class Staged(Whole):
    """Each rank of a pipeline holds the whole of its stages' parameters, and none of the others'.

    Args:
        tensors: of the whole model, by name.
        place: of this rank.
        device: of this rank.
    """

    def __init__(self, tensors: Mapping[str, Placed], place: Place, device: torch.device) -> None:
        super().__init__()
        self._tensors, self._place, self._device = tensors, place, device

    def gather(self, model: nn.Module, *, keep: bool, frozen: bool = True) -> dict[str, Tensor]:
        """See :meth:`ParamAccess.gather`; the first pipeline's ranks send, one tensor after another."""
        own, found = wanted(model, frozen=frozen), dict[str, Tensor]()
        if self._place.pipeline:
            return found
        for name, tensor in self._tensors.items():
            if not (frozen or tensor.trained):
                continue
            if tensor.owner == 0:
                if keep:
                    found[name] = copied(own[name])
            elif self._place.rank == tensor.owner:
                dist.send(own[name].detach().contiguous(), 0)
            elif self._place.rank == 0:
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                dist.recv(whole, tensor.owner)
                found[name] = copied(whole)
        return found
