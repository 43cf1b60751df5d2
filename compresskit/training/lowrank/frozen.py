"""A model whose weights take no gradient, read one tensor at a time, some of its layers replaced.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compresskit.modeling import ModelSource
from compresskit.modeling.skeleton import skeleton
from compresskit.modeling.streaming import assign, fill_buffers

Replace = Callable[[str, Tensor, Tensor | None], nn.Module]


def frozen_linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer on the CPU that computes with these values, copied, and takes no gradient.

    Args:
        weight_OI: (O, I), any float dtype; not modified.
        bias_O: or None.
    """
    rows, inputs = weight_OI.shape
    layer = nn.Linear(inputs, rows, bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI.detach().clone(), requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach().clone(), requires_grad=False)
    return layer


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
