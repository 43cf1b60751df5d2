"""Objectives that look at what blocks make, too, in the student and in its teacher.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.attention import Attended, attending
from compresskit.modeling.forwards import keeping
from compresskit.training.objective import IGNORED, LOSS, Head, Signal
from compresskit.training.sentences import SENTENCE_PROJECTION, on_sentences

OUTPUT, ATTENTION = "output", "attention"
PROJECTIONS = "feature_projections"
"""Where projections are in the model while it trains: an engine takes them for part of it."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Which tokens of a batch count in a feature loss, and which of them attention may compare.

    Attributes:
        share_BT: what a token's loss is multiplied by before they are added up; 0 where it does not count.
        document_BT: int64; tokens with the same number may see each other, those below 0 are padding.
        is_causal: whether a token sees only itself and those before it.
    """

    share_BT: Tensor
    document_BT: Tensor
    is_causal: bool

    @classmethod
    def of_text(cls, labels_BT: Tensor, position_ids_BT: Tensor) -> Counted:
        """Of packed rows: a token counts where it predicts a label, not shifted; documents begin at 0."""
        share_BT = torch.zeros(labels_BT.shape, device=labels_BT.device)
        share_BT[:, :-1] = (labels_BT[:, 1:] != IGNORED).to(share_BT.dtype)
        return cls(share_BT, (position_ids_BT == 0).cumsum(-1), True)

    @classmethod
    def of_sentences(cls, mask_BT: Tensor) -> Counted:
        """Of padded sentences: all tokens of one together count as one."""
        share_BT = mask_BT.float() / mask_BT.sum(-1, keepdim=True).clamp_min(1)
        return cls(share_BT, mask_BT.long() - 1, False)

    @property
    def sees_BTT(self) -> Tensor:
        """Which token, (B, T, T) bool, sees which; the first axis of tokens is that of the seeing ones."""
        document_BT = self.document_BT
        sees_BTT = (document_BT[:, :, None] == document_BT[:, None]) & (document_BT >= 0)[:, None]
        return sees_BTT.tril() if self.is_causal else sees_BTT

    def total(self, loss_BT: Tensor) -> Tensor:
        """Of the losses of tokens, those that count added up; the others may be anything."""
        return (loss_BT * self.share_BT).masked_fill(self.share_BT == 0, 0).sum()


@dataclass(frozen=True, slots=True)
class Looks:
    """Which blocks of a model feature losses look at, counted from 0, each of them once.

    Attributes:
        outputs: whose output is compared.
        attended: of which what their attention is given is.
    """

    outputs: tuple[int, ...] = ()
    attended: tuple[int, ...] = ()


class Watched(NamedTuple):
    """The blocks of a live model that :class:`Looks` names."""

    outputs: tuple[nn.Module, ...] = ()
    attended: tuple[nn.Module, ...] = ()


@runtime_checkable
class Featured(Protocol):
    """An objective with feature losses besides, which are added to what it returns."""

    needs_teacher: ClassVar[bool]

    @property
    def inner(self) -> Any:
        """The objective without them: an ``Objective`` or a ``SentenceObjective``."""
        ...

    @property
    def looks(self) -> Looks:
        """Which blocks of the model are compared."""
        ...

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """See ``Objective.__call__``."""
        ...

    def projections(self) -> Mapping[str, nn.Module]:
        """From D to E, each by a name that a module may have; none where the widths are equal."""
        ...

    def feature_losses(
        self,
        student: Sequence[Any],
        teacher: Sequence[Any],
        counted: Counted,
        projections: Mapping[str, nn.Module],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Their weighted sum over the tokens that count, and each by itself, unweighted and detached.

        Args:
            student: of the blocks of :attr:`looks` the outputs (B, T, D), then ``Attended`` of the others.
            teacher: the teacher's, which may be other numbers of them.
            counted: the tokens that count.
            projections: those of :meth:`projections`, trained.
        """
        ...


@contextmanager
def looking_at(watched: Watched) -> Iterator[Callable[[], tuple[Tensor | Attended, ...]]]:
    """Within, what is looked at is kept as the blocks run.

    Yields:
        What gives it once they ran: the outputs, then what attention was given.
    """
    looking: AbstractContextManager[Mapping[nn.Module, Attended]] = nullcontext({})
    if watched.attended:
        looking = attending(watched.attended)
    with keeping(watched.outputs) as outputs, looking as attended:
        yield lambda: (
            *(outputs[block] for block in watched.outputs),
            *(attended[block] for block in watched.attended),
        )


@contextmanager
def projecting(model: nn.Module, objective: object) -> Iterator[None]:
    """While this lasts, ``model`` has the projections of ``objective`` among its own parameters."""
    added: dict[str, nn.Module] = {}
    if isinstance(objective, Featured) and (made := objective.projections()):
        # No ModuleList: the longest of those are taken for a model's blocks.
        added[PROJECTIONS] = nn.ModuleDict(made)
    inner = on_sentences(objective)
    if inner is not None and (single := inner.sentence_projection()) is not None:
        added[SENTENCE_PROJECTION] = single
    for name, module in added.items():
        model.add_module(name, module)
    try:
        yield
    finally:
        for name in added:
            delattr(model, name)


def without_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as that of the model alone."""
    added = (f"{PROJECTIONS}.", f"{SENTENCE_PROJECTION}.")
    return {name: t for name, t in tensors.items() if not name.startswith(added)}


def watched_in(model: nn.Module, looks: Looks) -> Watched:
    """The blocks of a live ``model`` that ``looks`` names.

    Raises:
        ModelError: it has fewer.
    """
    asked = (*looks.outputs, *looks.attended)
    names = anatomy_of(model).blocks if asked else ()
    if asked and max(asked) >= len(names):
        cure = "Choose other layers for the feature loss."
        raise ModelError(Fault(type(model).__name__, f"a block {max(asked)}", f"{len(names)} blocks", cure))
    outputs, attended = (
        tuple(model.get_submodule(names[block]) for block in blocks)
        for blocks in (looks.outputs, looks.attended)
    )
    return Watched(outputs, attended)


def with_feature_losses(
    objective: Featured,
    sums: Mapping[str, Tensor],
    model: nn.Module,
    seen: Sequence[Any],
    signal: Signal,
    counted: Counted,
) -> Mapping[str, Tensor]:
    """``sums`` of the objective with its feature losses added to the loss, and each named apart.

    Args:
        objective: whose losses they are.
        sums: of the objective alone.
        model: whose projections are called as any layer is, so that engines gather their weights.
        seen: of its blocks, from :func:`looking_at`.
        signal: of the teacher, whose blocks they are compared with.
        counted: the tokens that count.
    """
    projections = getattr(model, PROJECTIONS, {})
    total, parts = objective.feature_losses(seen, signal.blocks_BTE, counted, projections)
    return {**sums, LOSS: sums[LOSS] + total, **parts}
