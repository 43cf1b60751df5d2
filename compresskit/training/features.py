"""Objectives that look at what blocks make, too, in the student and in its teacher.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import anatomy_of
from compresskit.training.objective import LOSS, Head, Signal

FEATURES = "features"
PROJECTIONS = "feature_projections"
"""Where projections are in the model while it trains: an engine takes them for part of it."""


@runtime_checkable
class Featured(Protocol):
    """An ``Objective`` with a feature loss besides, which is added to what it returns."""

    needs_teacher: ClassVar[bool]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of the model, counted from 0: whose output is compared; each with one of ``Signal.blocks_BTE``."""
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

    def feature_loss(
        self, student_BTE: Sequence[Tensor], teacher_BTE: Sequence[Tensor], labels_BT: Tensor
    ) -> Tensor:
        """Mean over the compared blocks of the sum over supervised tokens, before the weight.

        Args:
            student_BTE: of each of :attr:`blocks`, projected.
            teacher_BTE: of the teacher's blocks, as many.
            labels_BT: not shifted; a token counts where it predicts a label.
        """
        ...


@contextmanager
def projecting(model: nn.Module, objective: object) -> Iterator[None]:
    """While this lasts, ``model`` has the projections of ``objective`` among its own parameters."""
    made = objective.projections() if isinstance(objective, Featured) else ()
    if not made:
        yield
        return
    # No ModuleList: the longest of those are taken for a model's blocks.
    model.add_module(PROJECTIONS, nn.ModuleDict({str(i): m for i, m in enumerate(made)}))
    try:
        yield
    finally:
        delattr(model, PROJECTIONS)


def without_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as that of the model alone."""
    return {name: t for name, t in tensors.items() if not name.startswith(f"{PROJECTIONS}.")}


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
    states_BTD: Sequence[Tensor],
    teacher_BTE: Sequence[Tensor],
    labels_BT: Tensor,
) -> Mapping[str, Tensor]:
    """``sums`` of the objective with its feature loss added to the loss, and named apart.

    Args:
        objective: whose loss it is.
        sums: of the objective alone.
        model: whose projections are called as any layer is, so that engines gather their weights.
        states_BTD: of the compared blocks.
        teacher_BTE: of the teacher's.
        labels_BT: not shifted.
    """
    projections = getattr(model, PROJECTIONS, None)
    if projections is not None:
        states_BTD = [projections[str(i)](state) for i, state in enumerate(states_BTD)]
    features = objective.feature_loss(states_BTD, teacher_BTE, labels_BT)
    return {**sums, LOSS: sums[LOSS] + objective.weight * features, FEATURES: features.detach()}
