"""What a feature loss adds to another one: block by block a student learns what its teacher makes of a text.

Where the two are of different widths, each compared block of the student has a linear map to the teacher's
width, trained along with the student and thrown away in the end.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresskit.distill import FEATURE_LOSSES
from compresskit.modeling.attention import Attended
from compresskit.registry import locate
from compresskit.training.features import ATTENTION, Counted
from compresskit.training.objective import Head, Signal


@dataclass(frozen=True, kw_only=True)
class WithFeatures:
    """An objective, and a feature loss besides; see ``compresskit.training.features``.

    Attributes:
        objective: ``target`` and ``options`` of the other loss, as in ``compresskit.training.job.Part``.
        method: a name of ``compresskit.distill.FEATURE_LOSSES``.
        options: its own fields.
        pairs: blocks of the student and of the teacher that are compared.
        widths: of the student's and the teacher's hidden states, where they differ; else None.
    """

    needs_teacher: ClassVar[bool] = True

    objective: Mapping[str, Any]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: Sequence[Sequence[int]]
    widths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        # A job's options have been through JSON.
        object.__setattr__(self, "pairs", tuple(map(tuple, self.pairs)))
        object.__setattr__(self, "widths", self.widths and tuple(self.widths))

    @property
    def blocks(self) -> tuple[int, ...]:
        """See ``Featured.blocks``."""
        return tuple(pair[0] for pair in self.pairs)

    @property
    def weight(self) -> float:
        """See ``Featured.weight``."""
        weight: float = self._loss.weight
        return weight

    @property
    def takes(self) -> str:
        """See ``Featured.takes``."""
        takes: str = self._loss.takes
        return takes

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Of the other loss alone; see ``Objective.__call__``."""
        sums: Mapping[str, Tensor] = self.inner(hidden_BTD, head, labels_BT, signal)
        return sums

    def projections(self) -> Sequence[nn.Module]:
        """See ``Featured.projections``; the same numbers whenever they are made."""
        if self.widths is None:
            return ()
        student, teacher = self.widths
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [nn.Linear(student, teacher, bias=False) for _ in self.pairs]

    def feature_loss(self, student: Sequence[Any], teacher: Sequence[Any], counted: Counted) -> Tensor:
        """See ``Featured.feature_loss``."""
        total = torch.zeros((), device=counted.share_BT.device)
        for mine, theirs in zip(student, teacher, strict=True):
            if self.takes == ATTENTION:
                mine, theirs = (Attended(*map(_wide, side)) for side in (mine, theirs))
                loss_BT = self._loss(mine, theirs, counted.sees_BTT)
            else:
                loss_BT = self._loss(_wide(mine), _wide(theirs))
            total = total + counted.total(loss_BT)
        return total / len(self.pairs)

    @cached_property
    def _loss(self) -> Any:
        return FEATURE_LOSSES[self.method](**self.options)

    @cached_property
    def inner(self) -> Any:
        """See ``Featured.inner``."""
        return locate(self.objective["target"])(**self.objective["options"])


def _wide(states: Tensor) -> Tensor:
    """In fp32 at least: squares of large states overflow fp16, and sums of them lose much in bf16."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
