"""A model whose weights take no gradient, read one tensor at a time, some of its layers replaced.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.errors import EngineError, Fault
from compresskit.modeling import ModelSource
from compresskit.modeling.skeleton import skeleton
from compresskit.modeling.streaming import assign, fill_buffers

Replace = Callable[[str, Tensor, Tensor | None], nn.Module]


def frozen_linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer on the CPU that computes with these values, copied, and takes no gradient.

    Args:
        weight_OI: (O, I), any float dtype; not modified. One of 16 bits keeps them.
        bias_O: or None.
    """
    rows, inputs = weight_OI.shape
    if weight_OI.element_size() == 2 and weight_OI.numel() % 2 == 0:
        return NarrowLinear(weight_OI, bias_O)
    layer = nn.Linear(inputs, rows, bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI.detach().clone(), requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach().clone(), requires_grad=False)
    return layer


class NarrowLinear(nn.Linear):
    """A frozen layer of 16 bits a weight, which computes what one widened to the type of its input does.

    Pairs of weights pass for one float32 number, the type that all weights in training have: no engine
    widens them, and one that splits such numbers among ranks splits these too.

    Args:
        weight_OI: (O, I), bfloat16 or float16.
        bias_O: or None.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        self._stored = weight_OI.dtype
        pairs = weight_OI.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.float32)
        self.pairs = nn.Parameter(pairs, requires_grad=False)
        bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (O, I) in float32."""
        return _weight(self.pairs.detach(), self._stored, (self.out_features, self.in_features)).float()

    def forward(self, input: Tensor) -> Tensor:
        """As ``torch.nn.Linear``."""
        if self.pairs.dtype != torch.float32:
            cure = "Use strategy ddp, or another version of the engine."
            expected, got = "bytes that the engine leaves alone", str(self.pairs.dtype)
            raise EngineError(Fault("weights of 16 bits", expected, got, cure))
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = (self.out_features, self.in_features)
        output: Tensor = _Product.apply(input.to(dtype), self.pairs, bias, self._stored, shape)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """With a narrow weight, of which no wide copy waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pairs: Tensor, bias: Tensor | None, stored: torch.dtype, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.form = stored, shape
        return F.linear(x, _weight(pairs, *ctx.form).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (pairs,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ _weight(pairs, *ctx.form).to(gradient.dtype), None, None, None, None


def _weight(pairs: Tensor, stored: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """The weight that ``pairs`` are of, as it is stored."""
    return pairs.view(stored).view(shape)


def frozen_model(source: ModelSource, layers: frozenset[str], replace: Replace) -> nn.Module:
    """The model of ``source`` with ``layers`` replaced, read one tensor at a time; nothing takes a gradient.

    Args:
        source: a dense checkpoint.
        layers: names of linear layers.
        replace: called with a layer's name, weight (O, I) and bias; makes what takes its place.

    Returns:
        The module on the CPU, in evaluation mode; what is not replaced has its stored dtype.
    """
    model: nn.Module = skeleton(source)
    fill_buffers(model, torch.device("cpu"))
    for name in source.names():
        layer, _, leaf = name.rpartition(".")
        if layer not in layers:
            assign(model, name, source.tensor(name))
        elif leaf == "weight":
            bias = f"{layer}.bias"
            made = replace(layer, source.weight_OI(layer), source.tensor(bias) if bias in source else None)
            parent, _, child = layer.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    return model.requires_grad_(False).eval()
