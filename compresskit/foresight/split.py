"""Split layers as a forecast sees them: what a rank keeps of each, and what exchanging their results takes.

What it foretells is ``compresskit.training.mesh.split``, which splits live models over real ranks.

Shapes: O = outputs of a layer, I = inputs, V = vocabulary, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.foresight.states import ITEM, Shape
from compresskit.modeling.anatomy import Anatomy
from compresskit.training.mesh.plan import INPUTS, OUTPUTS, styles


def local_shapes(config: Any, anatomy: Anatomy, shapes: Mapping[str, Shape], ways: int) -> dict[str, Shape]:
    """What the fullest of ``ways`` ranks keeps of each parameter.

    Args:
        config: of the model.
        anatomy: of the model.
        shapes: of its parameters, by name.
        ways: ranks that share each layer; 1 leaves all as it is.
    """
    if ways == 1:
        return dict(shapes)
    found = styles(config, anatomy.linears)
    ends = (anatomy.embeddings, anatomy.head)

    def local(name: str, shape: Shape) -> Shape:
        module, _, leaf = name.rpartition(".")
        style = found.get(module)
        if shape and (style in OUTPUTS or module in ends):
            return (-(-shape[0] // ways), *shape[1:])
        if style in INPUTS and leaf == "weight":
            return (shape[0], -(-shape[1] // ways))
        return shape

    return {name: local(name, shape) for name, shape in shapes.items()}


def exchanged_bytes(config: Any, anatomy: Anatomy, item: int, recomputed: float) -> float:
    """Of one token, added up over the ranks in one pass.

    Args:
        config: of the model.
        anatomy: of the model.
        item: bytes of what a product makes.
        recomputed: share of the blocks that are computed once more in the backward pass.
    """
    found = styles(config, anatomy.linears)
    total = float(ITEM * config.get_text_config().hidden_size)  # the embedding's
    for name, style in found.items():
        linear = anatomy.linears[name]
        if style in OUTPUTS:  # the gradient of its inputs
            total += ITEM * linear.in_features
        if style in INPUTS:
            total += item * linear.out_features * (1 + recomputed)
    return total


def split(model: nn.Module, ways: int) -> None:
    """Keep of a model without memory what one of ``ways`` ranks has; the others are not there.

    What ranks would exchange is made and dropped as it would be, so that it is counted.
    """
    for name, style in styles(model.config, dict(model.named_modules())).items():
        linear: Any = model.get_submodule(name)
        if style in OUTPUTS:
            _keep(linear, "weight", (linear.out_features // ways, linear.in_features))
            if linear.bias is not None:
                _keep(linear, "bias", (linear.out_features // ways,))
            linear.register_forward_pre_hook(lambda _, given: (_applied(_Same, given[0]), *given[1:]))
            if style != OUTPUTS[0]:
                linear.register_forward_hook(lambda _, __, made: torch.cat([made] * ways, -1))
        if style in INPUTS:
            _keep(linear, "weight", (linear.out_features, linear.in_features // ways))
            linear.register_forward_hook(lambda _, __, made: _applied(_Summed, made))
            if style != INPUTS[0]:
                linear.register_forward_pre_hook(lambda _, given: (given[0].chunk(ways, -1)[0], *given[1:]))
    _split_ends(model, ways)


def _split_ends(model: Any, ways: int) -> None:
    """The embedding, and the output projection, which is whole while it is called."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    vocabulary, width = embedding.weight.shape
    _keep(embedding, "weight", (-(-vocabulary // ways), width))
    embedding.register_forward_hook(lambda _, __, made: _applied(_Summed, made).clone())
    if tied:
        head.weight = embedding.weight
    else:
        _keep(head, "weight", (-(-vocabulary // ways), width))
    kept: list[Any] = []

    def before(module: nn.Module, _: Any) -> None:
        kept.append(module._parameters["weight"])
        module._parameters["weight"] = _applied(_Gathered, kept[0], vocabulary)  # type: ignore[assignment]

    def after(module: nn.Module, *_: Any) -> None:
        module._parameters["weight"] = kept.pop()

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)


def _keep(module: nn.Module, name: str, shape: Shape) -> None:
    whole = module.get_parameter(name)
    module.register_parameter(name, nn.Parameter(whole.new_empty(shape), whole.requires_grad))


def _applied(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    made: Tensor = function.apply(*given)  # type: ignore[no-untyped-call]
    return made


class _Same(torch.autograd.Function):
    """What all ranks have; its gradient is added up over them."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:  # type: ignore[override]
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clone()


class _Summed(torch.autograd.Function):
    """What is added up over the ranks; all have its gradient."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:  # type: ignore[override]
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class _Gathered(torch.autograd.Function):
    """Rows of all ranks; each keeps its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: int) -> Tensor:  # type: ignore[override]
        ctx.rows = part.shape[0]
        return part.new_empty(rows, *part.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient[: ctx.rows].clone(), None
