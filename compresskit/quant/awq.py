"""AWQ: scale up the inputs that carry most, so that their weights round with less error.

Paper: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
MLSys 2024, https://arxiv.org/abs/2306.00978, sections 3.2 (scales) and, in its code, the clipping of ranges.
The error of a choice is computed from the Gram matrix of the inputs: no forward passes.

Shapes: O = out_features, I = in_features, G = groups along I, M = members of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.options import Within
from compresskit.quant.affine import grid_for
from compresskit.quant.balance import Reader, share
from compresskit.quant.base import Quantized
from compresskit.quant.gptq import GPTQ
from compresskit.quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationAware:
    """One-shot quantisation of weights whose inputs were scaled by how large they are.

    Attributes:
        steps: powers between 0 and 1 that are tried for the scales; 0 tries none and scales nothing.
        by_weight: divide the scales by the other power of each input's mean weight, as the paper's code may;
            tried beside those without.
        clip_steps: ranges that are tried for each group of weights, beside all of it; 0 clips nothing.
        least_range: the smallest of them, as a fraction of all of it.
        gptq: round the scaled weights with GPTQ, instead of to nearest on clipped ranges.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_gram", "input_abs_mean"})

    steps: Annotated[int, Within(0)] = 20
    by_weight: bool = True
    clip_steps: Annotated[int, Within(0)] = 20
    least_range: Annotated[float, Within(0, 1, above=True)] = 0.5
    gptq: bool = False

    def scale(self, readers: Sequence[Reader], channel_I: Tensor) -> Tensor:
        """Choose the scales that cost the least output error of all readers together; pure, any device.

        Args:
            readers: linear layers of one input; their statistics hold ``input_gram_II`` (squared activation
                units) and ``input_abs_mean_I`` (activation units).
            channel_I: int64 (I,), the channel behind each input.

        Returns:
            float32 (I,): the best of those tried, all ones among them.

        Raises:
            StatisticError: a statistic is missing, misshapen or not finite.
            SchemeError: the group size does not divide I, or a weight is not finite.
        """
        best_I = torch.ones(len(channel_I), device=channel_I.device)
        least = scaling_error(readers, best_I)
        for scale_I in self._candidates(readers, channel_I):
            error = scaling_error(readers, scale_I)
            if error < least:
                best_I, least = scale_I, error
        return best_I

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats) -> Quantized:
        """Round one linear layer's weight, scaled already, on ranges that cost the least output error; pure.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            scheme: bits and groups.
            stats: must hold ``input_gram_II``: float32 (I, I), of the scaled inputs.

        Returns:
            The rounded weight (O, I) in ``weight_OI``'s dtype, and its grid. Zeros stay exactly zero.

        Raises:
            StatisticError: the Gram matrix is missing, misshapen or not finite.
            SchemeError: the group size does not divide I, or a weight is not finite.
        """
        if self.gptq:
            return GPTQ().quantize(weight_OI, scheme, stats)
        gram_II = stats.require("input_gram", weight_OI.shape[1])
        grid = grid_for(weight_OI, scheme, self._ranges(weight_OI, scheme, gram_II))
        return Quantized(weight_OI=grid.snap(weight_OI), grid=grid)

    def _candidates(self, readers: Sequence[Reader], channel_I: Tensor) -> Iterator[Tensor]:
        """Scales to try, each centred on 1."""
        inputs = len(channel_I)
        size_I = torch.stack([r.stats.require("input_abs_mean", inputs) for r in readers]).mean(0)
        weight_I = _mean_weight(readers)
        for step in range(self.steps + 1):
            power = step / max(self.steps, 1)
            if step:
                yield _centred(size_I.pow(power), channel_I)
            if self.by_weight and self.steps:
                yield _centred(size_I.pow(power) / (weight_I.pow(1 - power) + 1e-4), channel_I)

    def _ranges(self, weight_OI: Tensor, scheme: Scheme, gram_II: Tensor) -> Tensor:
        """What fraction of each group's range to cover, (O, G)."""
        rows, inputs = weight_OI.shape
        size = scheme.group_size or inputs
        gram_GMM = torch.stack([gram_II[i : i + size, i : i + size] for i in range(0, inputs, size)])
        best_OG = torch.ones(rows, inputs // size, device=weight_OI.device)
        least_OG = torch.full_like(best_OG, torch.inf)
        for step in range(self.clip_steps + 1):
            fraction = 1 - step / max(self.clip_steps, 1) * (1 - self.least_range)
            change_OI = grid_for(weight_OI, scheme, fraction).snap(weight_OI).float() - weight_OI.float()
            change_GOM = change_OI.reshape(rows, -1, size).transpose(0, 1)
            error_OG = ((change_GOM @ gram_GMM) * change_GOM).sum(-1).t()
            better_OG = error_OG < least_OG
            least_OG = error_OG.where(better_OG, least_OG)
            best_OG = best_OG.where(~better_OG, fraction)
        # A group's own error leaves out what it shares with its neighbours; the row's whole error decides.
        whole_O, clipped_O = (
            _row_error(grid_for(weight_OI, scheme, part).snap(weight_OI), weight_OI, gram_II)
            for part in (1.0, best_OG)
        )
        return best_OG.where((clipped_O < whole_O)[:, None], 1.0)


def scaling_error(readers: Sequence[Reader], scale_I: Tensor) -> float:
    """Mean squared change of all outputs of ``readers`` if columns are scaled by ``scale_I`` and rounded.

    Args:
        readers: linear layers of one input.
        scale_I: (I,), positive.

    Returns:
        In squared output units, summed over outputs.
    """
    total = 0.0
    for reader in readers:
        weight_OI = reader.weight_OI
        gram_II = reader.stats.require("input_gram", weight_OI.shape[1])
        scaled_OI = (weight_OI.float() * scale_I).to(weight_OI.dtype)
        rounded_OI = grid_for(scaled_OI, reader.scheme).snap(scaled_OI).float() / scale_I
        total += float(_row_error(rounded_OI, weight_OI, gram_II).sum(dtype=torch.float64))
    return total


def _row_error(new_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Mean squared change of each output, (O,)."""
    change_OI = new_OI.float() - weight_OI.float()
    return ((change_OI @ gram_II) * change_OI).sum(-1)


def _mean_weight(readers: Sequence[Reader]) -> Tensor:
    """The mean over all rows of each weight's size as a fraction of its group's largest, (I,)."""
    total_I, count = torch.zeros(()), 0
    for reader in readers:
        rows, inputs = reader.weight_OI.shape
        size_OGM = reader.weight_OI.float().abs().reshape(rows, -1, reader.scheme.group_size or inputs)
        size_OGM = size_OGM / (size_OGM.amax(-1, keepdim=True) + 1e-6)
        total_I, count = total_I.to(size_OGM) + size_OGM.reshape(rows, inputs).sum(0), count + rows
    return total_I / count


def _centred(scale_I: Tensor, channel_I: Tensor) -> Tensor:
    """``scale_I`` shared within channels, and the largest and the least equally far from 1."""
    scale_I = share(scale_I.clamp(min=1e-4), channel_I)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()
