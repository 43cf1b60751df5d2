"""Round to nearest: each weight goes to the closest point of its group's grid.

Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, https://arxiv.org/abs/1712.05877, section 2.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.quant.affine import grid_for
from compresskit.quant.base import Quantized
from compresskit.quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundToNearest:
    """One-shot quantisation without data."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats | None = None) -> Quantized:
        """Round one linear layer's weight; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            scheme: bits and groups.
            stats: not used.

        Returns:
            The rounded weight (O, I) in ``weight_OI``'s dtype, and its grid. Zeros stay exactly zero.

        Raises:
            SchemeError: the group size does not divide I, or a weight is not finite.
        """
        grid = grid_for(weight_OI, scheme)
        return Quantized(weight_OI=grid.snap(weight_OI), grid=grid)
