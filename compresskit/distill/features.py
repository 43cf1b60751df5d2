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
from compresskit.distill.base import FeatureLoss
from compresskit.registry import locate
from compresskit.training.objective import IGNORED, Head, Objective, Signal


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
        return self._loss.weight

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Of the other loss alone; see ``Objective.__call__``."""
        return self._objective(hidden_BTD, head, labels_BT, signal)

    def projections(self) -> Sequence[nn.Module]:
        """See ``Featured.projections``; the same numbers whenever they are made."""
        if self.widths is None:
            return ()
        student, teacher = self.widths
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [nn.Linear(student, teacher, bias=False) for _ in self.pairs]

    def feature_loss(
        self, student_BTE: Sequence[Tensor], teacher_BTE: Sequence[Tensor], labels_BT: Tensor
    ) -> Tensor:
        """See ``Featured.feature_loss``."""
        keep_BT = labels_BT[:, 1:] != IGNORED
        total = torch.zeros((), device=labels_BT.device)
        for mine_BTE, theirs_BTE in zip(student_BTE, teacher_BTE, strict=True):
            loss_BT = self._loss(_wide(mine_BTE[:, :-1]), _wide(theirs_BTE[:, :-1]))
            total = total + loss_BT.masked_fill(~keep_BT, 0).sum()
        return total / len(self.pairs)

    @cached_property
    def _loss(self) -> FeatureLoss:
        return FEATURE_LOSSES[self.method](**self.options)

    @cached_property
    def _objective(self) -> Objective:
        objective: Objective = locate(self.objective["target"])(**self.objective["options"])
        return objective


def _wide(states: Tensor) -> Tensor:
    """In fp32 at least: squares of large states overflow fp16, and sums of them lose much in bf16."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
