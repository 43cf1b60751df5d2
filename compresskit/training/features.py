"""Objectives that look at what blocks make, too, in the student and in its teacher.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.attention import Attended, attending
from compresskit.modeling.forwards import keeping
from compresskit.training.objective import IGNORED, LOSS, Head, Signal
from compresskit.training.sentences import SENTENCE_PROJECTION, on_sentences

OUTPUT, ATTENTION = "output", "attention"
FEATURES = "features"
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


@runtime_checkable
class Featured(Protocol):
    """An objective with a feature loss besides, which is added to what it returns."""

    needs_teacher: ClassVar[bool]

    @property
    def inner(self) -> Any:
        """The objective without the feature loss: an ``Objective`` or a ``SentenceObjective``."""
        ...

    @property
    def takes(self) -> str:
        """What of a block is compared: its ``output``, or what its ``attention`` is given."""
        ...

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of the model, counted from 0: which are compared; each with one of ``Signal.blocks_BTE``."""
        ...

    @property
    def weight(self) -> float:
        """What the feature loss is multiplied by."""
        ...

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """See ``Objective.__call__``."""
        ...

    def projections(self) -> Sequence[nn.Module]:
        """From D to E, one for each of :attr:`blocks`; none where the widths are equal."""
        ...

    def feature_loss(self, student: Sequence[Any], teacher: Sequence[Any], counted: Counted) -> Tensor:
        """Mean over the compared blocks of the sum over the tokens that count, before the weight.

        Args:
            student: of each of :attr:`blocks` what :attr:`takes` says, outputs (B, T, E) projected.
            teacher: of the teacher's blocks, as many.
            counted: the tokens that count.
        """
        ...


def looking_at(
    blocks: Sequence[nn.Module], takes: str
) -> AbstractContextManager[Mapping[nn.Module, Tensor | Attended]]:
    """Within, what ``takes`` says of each block is in the mapping once it ran."""
    return attending(blocks) if takes == ATTENTION else keeping(blocks)


@contextmanager
def projecting(model: nn.Module, objective: object) -> Iterator[None]:
    """While this lasts, ``model`` has the projections of ``objective`` among its own parameters."""
    added: dict[str, nn.Module] = {}
    if isinstance(objective, Featured) and (made := objective.projections()):
        # No ModuleList: the longest of those are taken for a model's blocks.
        added[PROJECTIONS] = nn.ModuleDict({str(i): m for i, m in enumerate(made)})
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


def compared_blocks(model: nn.Module, blocks: Sequence[int]) -> tuple[nn.Module, ...]:
    """The blocks of a live ``model`` with these numbers.

    Raises:
        ModelError: it has fewer.
    """
    names = anatomy_of(model).blocks if blocks else ()
    if blocks and max(blocks) >= len(names):
        cure = "Choose other layers for the feature loss."
        raise ModelError(Fault(type(model).__name__, f"a block {max(blocks)}", f"{len(names)} blocks", cure))
    return tuple(model.get_submodule(names[block]) for block in blocks)


def with_feature_loss(
    objective: Featured,
    sums: Mapping[str, Tensor],
    model: nn.Module,
    states: Sequence[Any],
    signal: Signal,
    counted: Counted,
) -> Mapping[str, Tensor]:
    """``sums`` of the objective with its feature loss added to the loss, and named apart.

    Args:
        objective: whose loss it is.
        sums: of the objective alone.
        model: whose projections are called as any layer is, so that engines gather their weights.
        states: of the compared blocks, what ``takes`` says.
        signal: of the teacher, whose blocks they are compared with.
        counted: the tokens that count.
    """
    projections = getattr(model, PROJECTIONS, None)
    if projections is not None:
        states = [projections[str(i)](state) for i, state in enumerate(states)]
    features = objective.feature_loss(states, signal.blocks_BTE, counted)
    return {**sums, LOSS: sums[LOSS] + objective.weight * features, FEATURES: features.detach()}
