"""Fake quantisation: a layer computes with its weight and input rounded, and learns as if they were not.

The forward pass runs the very functions that make the saved checkpoint (``grid_for`` and ``Grid.snap``), so
that conversion changes nothing. The gradient passes the rounding unchanged ("straight through"), and stops
where a value lies outside of a range that does not follow it.

Paper: Esser et al., "Learned Step Size Quantization", 2020, https://arxiv.org/abs/1902.08153, for learned
scales. Here the logarithm of a scale over its start is what is trained: it stays positive, and a step of an
optimiser such as Adam changes it by a share of itself, however small it is.

Shapes: O = out_features, I = in_features, G = groups along I, M = members of a group; ``_I`` alone: any
leading dimensions, then I.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from compresskit.errors import Fault, SchemeError
from compresskit.formats.grid import Grid
from compresskit.quant.affine import activation_scale, grid_for, least_error_grid
from compresskit.quant.scheme import Scheme

DYNAMIC, LEARNED = "dynamic", "learned"


class RoundedLinear(nn.Linear):
    """A linear layer that computes with its weight on a grid, and its input rounded where that is asked.

    Made from a linear layer in place by :func:`round_in_place`, never constructed. Its own parameters are
    fp32 masters; ``log_scale_OG`` is one more of them where scales are learned.
    """

    scheme: Scheme
    scales: str
    stored_dtype: torch.dtype
    observed_passes: int
    observes: bool
    start_scale_OG: Tensor
    zero_point_OG: Tensor | None
    log_scale_OG: nn.Parameter
    input_max: Tensor
    passes: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        rounded_I, weight_OI = self.operands(input)
        return linear(rounded_I, weight_OI, self.bias)

    def operands(self, input_I: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied: the input (..., I) and the weight (O, I), both rounded, in their own dtypes."""
        if self.scheme.static:
            self._observe(input_I)
            # Until something was observed there is nothing to round by.
            rounded_I = round_static(input_I, activation_scale(self.input_max, self.stored_dtype))
            input_I = torch.where(self.input_max > 0, rounded_I, input_I)
        elif self.scheme.activation_bits:
            input_I = _through(input_I, round_tokens(input_I, self.scheme.activation_bits))
        return input_I, self._rounded_weight()

    def _rounded_weight(self) -> Tensor:
        if self.scales == LEARNED:
            scale_OG = learned_scale(self.start_scale_OG, self.log_scale_OG)
            return cast(Tensor, _Learned.apply(self.weight, scale_OG, self))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            stored_OI = self.weight.to(self.stored_dtype)
            if self.scales == DYNAMIC:
                rounded_OI, inside_OI = grid_for(stored_OI, self.scheme).snap(stored_OI), None
            else:
                grid = self.grid(self.start_scale_OG)
                inside_OI = _inside(_levels(self.weight, grid), grid.bits).reshape(self.weight.shape)
                rounded_OI = grid.snap(stored_OI)
        return _through(self.weight, rounded_OI.to(self.weight.dtype), inside_OI)

    def grid(self, scale_OG: Tensor) -> Grid:
        """The grid of such scales."""
        return Grid(
            bits=self.scheme.weight_bits,
            scale_OG=scale_OG.detach().to(self.stored_dtype),
            group_size=self.scheme.group_size,
            zero_point_OG=self.zero_point_OG,
        )

    @torch.no_grad()
    def _observe(self, input_I: Tensor) -> None:
        """Keep the largest input of the first training passes of all processes together."""
        if not self.training or not self.observes:
            return
        self.observes = int(self.passes) < self.observed_passes
        if not self.observes:
            return
        largest = torch.maximum(self.input_max, input_I.detach().abs().amax().to(self.input_max.dtype))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.input_max.copy_(largest)
        self.passes += 1


def round_in_place(
    layer: nn.Linear, scheme: Scheme, *, scales: str, dtype: torch.dtype, observed_passes: int
) -> None:
    """Turn ``layer`` into a :class:`RoundedLinear`; its parameters stay the same objects.

    Args:
        layer: an ordinary linear layer, its weight whole.
        scheme: the grid's form; integers.
        scales: of weights: ``dynamic`` covers the weight as it is in every pass; ``fixed`` takes the range
            with the least squared error once, now; ``learned`` starts there and trains it.
        dtype: that the checkpoint will store.
        observed_passes: training passes whose largest input sets a static activation scale.

    Raises:
        SchemeError: the scheme does not fit, or the layer's class computes something else than a linear
            layer does.
    """
    if type(layer).forward is not nn.Linear.forward:
        cure = "Leave such layers out of the targets."
        raise SchemeError(Fault("targets", "layers of class torch.nn.Linear", type(layer).__name__, cure))
    layer.__class__ = RoundedLinear
    assert isinstance(layer, RoundedLinear)
    layer.scheme, layer.scales, layer.stored_dtype = scheme, scales, dtype
    layer.observed_passes, layer.observes = observed_passes, True
    if scales != DYNAMIC:
        start = least_error_grid(layer.weight.detach().to(dtype), scheme)
        layer.register_buffer("start_scale_OG", start.scale_OG)
        layer.register_buffer("zero_point_OG", start.zero_point_OG)
    if scales == LEARNED:
        layer.log_scale_OG = nn.Parameter(torch.zeros_like(layer.start_scale_OG, dtype=torch.float32))
    if scheme.static:
        layer.register_buffer("input_max", torch.zeros(1))
        layer.register_buffer("passes", torch.zeros((), dtype=torch.int64))


def learned_scale(start_OG: Tensor, log_OG: Tensor) -> Tensor:
    """The scale (O, G), fp32, whose logarithm over ``start_OG`` is ``log_OG``."""
    return start_OG.float() * log_OG.float().exp()


def round_tokens(input_I: Tensor, bits: int) -> Tensor:
    """Round onto ``bits`` with one symmetric scale per token, to the bit as compressed-tensors runs w8a8.

    Args:
        input_I: (..., I), any float dtype, in which all arithmetic is done; each (I,) has a scale.
        bits: 8 for w8a8.

    Returns:
        The rounded values, same shape and dtype; no gradient.
    """
    with torch.no_grad():
        scale_1 = input_I.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
        scale_1 = scale_1.where(scale_1 != 0, 1)
        half = 2 ** (bits - 1)
        rounded_I: Tensor = (input_I / scale_1).clamp_(-half, half - 1).round_().mul_(scale_1)
    return rounded_I


def round_static(input_I: Tensor, scale: Tensor) -> Tensor:
    """Round onto 8 bits with one scale for all inputs; no gradient where an input lies outside of its range.

    Args:
        input_I: (..., I), any float dtype, in which all arithmetic is done.
        scale: (1,), positive.

    Returns:
        The rounded values, same shape and dtype.
    """
    with torch.no_grad():
        scale = scale.to(input_I.dtype)
        level_I = (input_I / scale).round_()
        inside_I = _inside(level_I, 8)
        rounded_I = level_I.clamp_(-128, 127).mul_(scale)
    return _through(input_I, rounded_I, inside_I)


def _through(value: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    return cast(Tensor, _Through.apply(value, rounded, inside))  # type: ignore[no-untyped-call]


class _Through(torch.autograd.Function):
    """``rounded`` forwards; backwards the gradient of ``value``, only where ``inside`` if that is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] if inside is None else gradients[0] * inside, None, None


class _Learned(torch.autograd.Function):
    """A weight on the grid of a scale that learns, too: equation 3 of the paper, and its gradient scale.

    Recomputes what it needs backwards, so that nothing the size of the weight is kept.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scale_OG: Tensor, layer: RoundedLinear) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_OG)
        ctx.layer = layer
        return layer.grid(scale_OG).snap(weight_OI.to(layer.stored_dtype)).to(weight_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_OI, scale_OG = ctx.saved_tensors
        grid = ctx.layer.grid(scale_OG)
        zero_OGM = 0.0 if grid.zero_point_OG is None else grid.zero_point_OG.unsqueeze(-1).float()
        level_OGM, gradient_OGM = _levels(weight_OI, grid), gradients[0].reshape(*scale_OG.shape, -1)
        inside_OGM = _inside(level_OGM, grid.bits)
        highest = 2 ** (grid.bits - 1) - 1
        nearest_OGM = level_OGM.round().clamp_(-highest - 1, highest)
        slope_OGM = nearest_OGM - torch.where(inside_OGM, level_OGM, zero_OGM)
        members = level_OGM.shape[-1]
        by_scale_OG = (gradient_OGM * slope_OGM).sum(-1) / (members * highest) ** 0.5
        return (gradient_OGM * inside_OGM).reshape(weight_OI.shape), by_scale_OG, None


def _levels(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Where on the grid each weight lies, (O, G, M): not rounded, its zero point included."""
    scale_OG1 = grid.scale_OG.float().unsqueeze(-1)
    level_OGM = weight_OI.float().reshape(*grid.scale_OG.shape, -1) / scale_OG1
    if grid.zero_point_OG is not None:
        level_OGM = level_OGM + grid.zero_point_OG.unsqueeze(-1)
    return level_OGM


def _inside(level: Tensor, bits: int) -> Tensor:
    """Whether the nearest integer to each level is one of a grid of ``bits``."""
    half = 2 ** (bits - 1)
    nearest = level.round()
    inside: Tensor = (nearest >= -half) & (nearest < half)
    return inside
