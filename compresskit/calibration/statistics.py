"""What calibration measures about the inputs of a linear layer.

Shapes: T = tokens, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.errors import Fault, StatisticError

# What a method may name in its ``needs``, and the field of LayerStats that holds it.
STATISTICS: Mapping[str, str] = {
    "input_mean": "input_mean_I",
    "input_sq_mean": "input_sq_mean_I",
    "input_abs_mean": "input_abs_mean_I",
    "input_abs_max": "input_abs_max_I",
    "input_gram": "input_gram_II",
}


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of one layer's inputs over all calibration tokens; padding does not count.

    Each is None unless a method asked for it, and float32.

    Attributes:
        num_tokens: tokens seen; 0 means the layer never ran.
        input_sq_mean_I: mean of x_j**2, (I,), in squared activation units.
        input_mean_I: mean of x_j, (I,), in activation units.
        input_abs_mean_I: mean of ``|x_j|``, (I,), in activation units.
        input_abs_max_I: maximum of ``|x_j|``, (I,), in activation units.
        input_gram_II: mean of x_i x_j, (I, I), in squared activation units.
        layer: its name, for errors.
    """

    num_tokens: int
    input_sq_mean_I: Tensor | None = None
    input_mean_I: Tensor | None = None
    input_abs_mean_I: Tensor | None = None
    input_abs_max_I: Tensor | None = None
    input_gram_II: Tensor | None = None
    layer: str = ""

    def require_input_sq_mean(self, in_features: int) -> Tensor:
        """Return ``input_sq_mean_I`` or raise StatisticError saying why it is unusable."""
        return self.require("input_sq_mean", in_features)

    def require(self, need: str, in_features: int) -> Tensor:
        """The statistic called ``need``, checked.

        Args:
            need: a name of :data:`STATISTICS`.
            in_features: I of the layer.

        Returns:
            float32, (I,), or (I, I) for ``input_gram``.

        Raises:
            StatisticError: it was not collected, the layer saw no tokens, or it is misshapen or not finite.
        """
        value: Tensor | None = getattr(self, STATISTICS[need])
        where = f"{self.layer or 'layer'}: {need}"
        if value is None or self.num_tokens == 0:
            got = "no calibration tokens" if self.num_tokens == 0 else "a statistic that was not collected"
            cure = "Give more calibration samples, or add the layer to ignore."
            raise StatisticError(Fault(where, "statistics of the layer's inputs", got, cure))
        shape = (in_features, in_features) if need == "input_gram" else (in_features,)
        if value.shape != shape:
            cure = "Collect it for this layer."
            raise StatisticError(Fault(where, f"shape {shape}", f"{tuple(value.shape)}", cure))
        if not torch.isfinite(value).all():
            cure = "Calibrate in bfloat16 or float32 instead of float16, or look for faults in the model."
            raise StatisticError(Fault(where, "finite values", "inf or nan", cure))
        return value


class Accumulator:
    """Sums up one layer's inputs batch by batch; the vectors in float64, the Gram matrix in float32.

    Args:
        needs: names of :data:`STATISTICS`.
        in_features: I.
        device: where to keep the sums.

    Raises:
        KeyError: a name in ``needs`` is no statistic; the fault of a method, not of a user.
    """

    def __init__(self, needs: frozenset[str], in_features: int, device: torch.device) -> None:
        if unknown := needs - STATISTICS.keys():
            raise KeyError(f"no such statistics: {sorted(unknown)}; known are {sorted(STATISTICS)}")
        self.num_tokens = 0
        self._sums = {
            need: torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
            if need == "input_gram"
            else torch.zeros(in_features, dtype=torch.float64, device=device)
            for need in needs
        }

    def add(self, input_TI: Tensor) -> None:
        """Count the rows of ``input_TI`` (T, I), of any float dtype, as tokens."""
        x_TI = input_TI.detach().float()
        self.num_tokens += x_TI.shape[0]
        for need, sums in self._sums.items():
            if need == "input_mean":
                sums += x_TI.sum(0, dtype=torch.float64)
            elif need == "input_sq_mean":
                sums += x_TI.square().sum(0, dtype=torch.float64)
            elif need == "input_abs_mean":
                sums += x_TI.abs().sum(0, dtype=torch.float64)
            elif need == "input_abs_max" and len(x_TI):
                torch.maximum(sums, x_TI.abs().amax(0).double(), out=sums)
            elif need == "input_gram":
                sums.addmm_(x_TI.t(), x_TI)

    def finish(self, layer: str = "") -> LayerStats:
        """The statistics of the layer called ``layer``; call once, the sums are used up."""
        tokens = max(self.num_tokens, 1)
        for need, sums in self._sums.items():
            if need != "input_abs_max":
                sums /= tokens
        fields = {STATISTICS[need]: sums.float() for need, sums in self._sums.items()}
        return LayerStats(num_tokens=self.num_tokens, layer=layer, **fields)
