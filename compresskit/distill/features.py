"""What feature losses add to another one: block by block a student learns what its teacher makes of a text.

Where the two are of different widths, each compared block of the student has a linear map to the teacher's
width for every block of the teacher that it is compared with, trained along with the student and thrown away
in the end. Losses that compare the same pair of blocks share it, as they share what the blocks made.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresskit.distill import FEATURE_LOSSES
from compresskit.distill.divergences import numbered
from compresskit.distill.mapping import Pairs
from compresskit.modeling.attention import Attended
from compresskit.registry import locate
from compresskit.training.features import ATTENTION, Counted, Looks
from compresskit.training.objective import Head, Signal


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One feature loss and the blocks it compares.

    Attributes:
        method: a name of ``compresskit.distill.FEATURE_LOSSES``.
        options: its own fields.
        pairs: of a block of the student and one of the teacher.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        # A job's options have been through JSON.
        object.__setattr__(self, "pairs", tuple(map(tuple, self.pairs)))

    @cached_property
    def loss(self) -> Any:
        """The method with its options."""
        return FEATURE_LOSSES[self.method](**self.options)

    @property
    def attends(self) -> bool:
        """Whether it compares what attention is given, and not outputs."""
        takes: str = FEATURE_LOSSES[self.method].takes
        return takes == ATTENTION


def looks_of(features: Iterable[Compared], side: int) -> Looks:
    """Which blocks ``features`` look at in the student, whose ``side`` is 0, or in the teacher, 1."""
    blocks: dict[bool, set[int]] = {False: set(), True: set()}
    for one in features:
        blocks[one.attends] |= {pair[side] for pair in one.pairs}
    return Looks(tuple(sorted(blocks[False])), tuple(sorted(blocks[True])))


def output_pairs(features: Iterable[Compared]) -> Pairs:
    """The pairs of blocks whose outputs ``features`` compare, each once, in the order they come up."""
    pairs = (pair for one in features if not one.attends for pair in one.pairs)
    return tuple(dict.fromkeys((student, teacher) for student, teacher in pairs))


@dataclass(frozen=True, kw_only=True)
class WithFeatures:
    """An objective, and a weighted sum of feature losses besides; see ``compresskit.training.features``.

    Attributes:
        objective: ``target`` and ``options`` of the other loss, as in ``compresskit.training.job.Part``.
        features: what is compared besides, each a :class:`Compared` or a mapping of its fields.
        widths: of the student's and the teacher's hidden states, where they differ; else None.
    """

    needs_teacher: ClassVar[bool] = True

    objective: Mapping[str, Any]
    features: Sequence[Any]
    widths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        # A job's options have been through JSON.
        made = tuple(one if isinstance(one, Compared) else Compared(**one) for one in self.features)
        object.__setattr__(self, "features", made)
        object.__setattr__(self, "widths", self.widths and tuple(self.widths))

    @property
    def looks(self) -> Looks:
        """See ``Featured.looks``."""
        return looks_of(self.features, 0)

    @property
    def looks_at_teacher(self) -> Looks:
        """Which blocks of the teacher are compared, as many as the signal has."""
        return looks_of(self.features, 1)

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Of the other loss alone; see ``Objective.__call__``."""
        sums: Mapping[str, Tensor] = self.inner(hidden_BTD, head, labels_BT, signal)
        return sums

    def projections(self) -> Mapping[str, nn.Module]:
        """See ``Featured.projections``; the same numbers whenever they are made."""
        if self.widths is None:
            return {}
        student, teacher = self.widths
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {
                _name(pair): nn.Linear(student, teacher, bias=False) for pair in output_pairs(self.features)
            }

    def feature_losses(
        self,
        student: Sequence[Any],
        teacher: Sequence[Any],
        counted: Counted,
        projections: Mapping[str, nn.Module],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See ``Featured.feature_losses``: of each the mean over its pairs; one there twice is numbered."""
        mine, ours = _by_block(self.looks, student)
        theirs, given = _by_block(self.looks_at_teacher, teacher)
        theirs = {block: _wide(state) for block, state in theirs.items()}
        states = {
            pair: _wide(projections[_name(pair)](mine[pair[0]]) if projections else mine[pair[0]])
            for pair in output_pairs(self.features)
        }
        sees_BTT = counted.sees_BTT if ours else None
        parts = {}
        for name, one in zip(self._names, self.features, strict=True):
            total = torch.zeros((), device=counted.share_BT.device)
            for pair in one.pairs:
                if one.attends:
                    loss_BT = one.loss(ours[pair[0]], given[pair[1]], sees_BTT)
                else:
                    loss_BT = one.loss(states[pair], theirs[pair[1]])
                total = total + counted.total(loss_BT)
            parts[name] = total / len(one.pairs)
        weights = (one.loss.weight for one in self.features)
        weighted = [weight * part for weight, part in zip(weights, parts.values(), strict=True)]
        return torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return numbered([one.method for one in self.features])

    @cached_property
    def inner(self) -> Any:
        """See ``Featured.inner``."""
        return locate(self.objective["target"])(**self.objective["options"])


def _name(pair: Sequence[int]) -> str:
    """Of the projection of a pair of blocks."""
    return "_".join(map(str, pair))


def _by_block(looks: Looks, made: Sequence[Any]) -> tuple[dict[int, Tensor], dict[int, Attended]]:
    """What was made by the number of its block; outputs are as they are, what attention is given is wide."""
    count = len(looks.outputs)
    outputs = dict(zip(looks.outputs, made[:count], strict=True))
    attended = zip(looks.attended, made[count:], strict=True)
    return outputs, {block: Attended(*map(_wide, each)) for block, each in attended}


def _wide(states: Tensor) -> Tensor:
    """In fp32 at least: squares of large states overflow fp16, and sums of them lose much in bf16."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
