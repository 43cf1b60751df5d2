"""Zeros that are made or moved while a model trains. Between two changes they are held as any others are.

No mask is stored: the zeros of the weights are the mask. So what a restart needs to know is in the checkpoint
already, and a weight that is to grow again starts at a number that is not zero.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from compresskit.training.access import ParamAccess
from compresskit.training.hold import weight_of


class Zeroing(Protocol):
    """Which weights are zero as steps go by: a frozen dataclass of plain data, made in every process."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Whose zeros change; each has a parameter ``weight`` of its own."""
        ...

    def due(self, step: int, steps: int) -> bool:
        """Whether zeros change after ``step`` of ``steps``; step 0 is before the first."""
        ...

    def needs_gradient(self, step: int, steps: int) -> bool:
        """Whether that change looks at the gradient of the whole weight in ``step``.

        Such a change is left out where the optimiser skipped the step, since the gradient overflowed.
        """
        ...

    def change(
        self, layer: str, weight_OI: Tensor, gradient_OI: Tensor | None, *, step: int, steps: int
    ) -> Tensor:
        """The weight (O, I) of ``layer`` to go on with.

        Args:
            layer: one of :attr:`layers`.
            weight_OI: as training left it; not modified.
            gradient_OI: of the step just taken, up to a factor, where :meth:`needs_gradient` asked for it;
                zeros where the layer took no part in that step.
            step: optimiser steps taken.
            steps: of the whole run.

        Returns:
            A weight of the same shape and dtype: a function of the arguments alone.
        """
        ...


def change_zeros(
    model: nn.Module, zeroing: Zeroing, access: ParamAccess, optimizer: Any, step: int, steps: int
) -> None:
    """Change the zeros of every layer of ``zeroing``, one after another; every rank calls it.

    Args:
        model: bare, as the engine has prepared it.
        zeroing: what to change; something is due.
        access: to the engine's parameters.
        optimizer: of torch.
        step: optimiser steps taken.
        steps: of the whole run.
    """
    for layer in zeroing.layers:
        new = partial(zeroing.change, layer, step=step, steps=steps)
        access.change(weight_of(model, layer), optimizer, new)
    access.drop()
