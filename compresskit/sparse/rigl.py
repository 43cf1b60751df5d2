"""RigL: the smallest weights are dropped now and then, and those grow whose gradient is the largest.

Paper: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
https://arxiv.org/abs/1911.11134. There a change takes the place of an optimiser step; here it follows one,
and grows by the gradient of that step.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresskit.sparse.base import Moment
from compresskit.sparse.rewire import Rewiring


@dataclass(frozen=True, slots=True, kw_only=True)
class RigL(Rewiring):
    """Growing where the loss asks for it most."""

    needs_gradient: ClassVar[bool] = True

    def knows(self, moment: Moment) -> bool:
        """Not by a gradient that overflowed, nor where the layer took no part in the step."""
        gradient_OI = moment.gradient_OI
        return gradient_OI is not None and bool(gradient_OI.isfinite().all()) and bool(gradient_OI.any())

    def growth(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """The size of the gradient, of weights that are zero too."""
        assert moment.gradient_OI is not None
        return moment.gradient_OI.abs().float()
