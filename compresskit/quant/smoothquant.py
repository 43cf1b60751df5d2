"""SmoothQuant: move what is hard to round from a layer's inputs into its weights.

Paper: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML 2023, https://arxiv.org/abs/2211.10438, equation 4.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.options import Within
from compresskit.quant.balance import Reader, share
from compresskit.quant.base import Quantized
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant:
    """One-shot quantisation of weights and inputs whose ranges were evened out.

    Attributes:
        alpha: how much of an input's range goes to its weights: 0 none of it, 1 all of it.
        norms_only: scale only what norms make, as the paper does: that is where the outliers are. Otherwise
            what other linear layers make too, such as values before the output projection.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_abs_max"})

    alpha: Annotated[float, Within(0, 1)] = 0.5
    norms_only: bool = True

    @staticmethod
    def misfit(scheme: Scheme) -> str:
        """What other scheme would be needed; empty if ``scheme`` rounds inputs."""
        return "" if scheme.activation_bits else "a scheme that rounds inputs, such as w8a8"

    def scale(self, readers: Sequence[Reader], channel_I: Tensor) -> Tensor:
        """The largest input to the power alpha over the largest weight to the power 1 - alpha; pure.

        Args:
            readers: linear layers of one input; their statistics hold ``input_abs_max_I``, activation units.
            channel_I: int64 (I,), the channel behind each input.

        Returns:
            float32 (I,); 1 where an input or all its weights were always zero, or nothing is to be scaled.

        Raises:
            StatisticError: a statistic is missing, misshapen or not finite.
        """
        inputs = len(channel_I)
        if self.norms_only and not readers[0].after_norm:
            return torch.ones(inputs, device=channel_I.device)
        input_I = torch.stack([r.stats.require("input_abs_max", inputs) for r in readers]).amax(0)
        weight_I = torch.stack([r.weight_OI.float().abs().amax(0) for r in readers]).amax(0)
        alive_I = (input_I > 0) & (weight_I > 0)
        scale_I = input_I.pow(self.alpha) / weight_I.pow(1 - self.alpha)
        return share(scale_I.where(alive_I, 1.0).clamp(min=1e-5), channel_I)

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats) -> Quantized:
        """Round one linear layer's weight, scaled already, to nearest; pure, any device.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            scheme: bits and groups.
            stats: not used.

        Returns:
            The rounded weight (O, I) in ``weight_OI``'s dtype, and its grid. Zeros stay exactly zero.

        Raises:
            SchemeError: the group size does not divide I, or a weight is not finite.
        """
        return RoundToNearest().quantize(weight_OI, scheme, stats)
