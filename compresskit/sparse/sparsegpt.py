"""SparseGPT: zero weights input by input, and let the inputs still to come make up for each zero.

Paper: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
ICML 2023, https://arxiv.org/abs/2301.00774. Which weights of a block are zeroed is decided when the sweep
reaches it, by w over the pivot of the inverse Hessian's factor: how far the output moves without each at
best.

Shapes: O = out_features, I = in_features, B = inputs decided on together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.sweep import LARGEST_DAMPING, Change, inverse_factor, raised, sweep
from compresskit.options import Within
from compresskit.sparse.base import Pruned
from compresskit.sparse.pattern import Pattern, require_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGPT:
    """One-shot pruning that changes the weights it keeps, so that the layer's output changes least.

    Attributes:
        pattern: which zeros are allowed, e.g. ``NM(keep=2, of=4)``.
        damping: added to the Hessian's diagonal, as a fraction of its mean. Raised tenfold, up to 1, for as
            long as the Hessian has no Cholesky factor; the layer's record says so.
        block: inputs that are decided on together, where the pattern does not say: so many have their share
            of zeros.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_gram"})

    pattern: Pattern
    damping: Annotated[float, Within(0, LARGEST_DAMPING)] = 0.01
    block: Annotated[int, Within(1, 1 << 20)] = 128

    def prune(self, weight_OI: Tensor, stats: LayerStats) -> Pruned:
        """Zero weights of one linear layer and change the others; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            stats: must hold ``input_gram_II``: float32 (I, I), squared activation units.

        Returns:
            The pruned weight (O, I) in ``weight_OI``'s dtype, and its keep-mask. What was zero stays so.

        Raises:
            StatisticError: the Gram matrix is missing, misshapen, not finite or zero, or has no Cholesky
                factor however it is damped.
            PatternError: ``pattern`` does not fit (O, I). The plan checks this first.
        """
        require_fit(self.pattern, weight_OI)
        gram_II = stats.require("input_gram", weight_OI.shape[1])
        key = ("sparsegpt", self.damping)
        if key not in stats.shared:
            stats.shared[key] = inverse_factor(gram_II, self.damping, layer=stats.layer)
        factor_II, damping = stats.shared[key]
        unit = self.pattern.unit
        if self.pattern.units_compete:
            unit *= max(1, self.block // unit)
        new_OI, keep_OI = torch.empty_like(weight_OI), torch.empty_like(weight_OI, dtype=torch.bool)
        left_IO = weight_OI.t().to(torch.float32, copy=True).contiguous()
        pivot_I = factor_II.diagonal()

        def decide(start: int) -> None:
            some = slice(start, start + unit)
            score_OB = (left_IO[some] / pivot_I[some, None]).abs_().t().contiguous()
            dead_OB = weight_OI[:, some] == 0
            score_OB[dead_OB] = -1  # zeros that are there cost nothing
            keep_OI[:, some] = self.pattern.keep_part(score_OB, start) & ~dead_OB

        def begin(start: int, stop: int) -> Change:
            return change

        def change(at: int, left_O: Tensor) -> Tensor:
            if at % unit == 0:
                decide(at)
            # What is spread is the error of the weight as it is stored.
            return left_O.to(new_OI.dtype).float().where(keep_OI[:, at], 0)

        def end(start: int, stop: int, new_BO: Tensor) -> None:
            new_OI[:, start:stop] = new_BO.t().to(new_OI.dtype)

        sweep(left_IO, factor_II, begin, end, unit=unit)
        return Pruned(weight_OI=new_OI, keep_OI=keep_OI, note=raised(self.damping, damping))
