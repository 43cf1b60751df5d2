"""Products in int8 while a model trains (torchao's INT8 mixed-precision training).

Weights stay what they are; a layer rounds each row of what it multiplies to int8, forward and backward, and
scales the int32 sums. Only the class of a layer is swapped, so engines, state dicts and held zeros see plain
parameters. torchao's other way, a tensor class for the weight, is not used: in torchao 0.18 it multiplies in
float without a word, since its own ``linear`` is entered in a table that is asked for ATen operators only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from compresskit.errors import EngineError, Fault

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU whose tensor cores Triton lets multiply int8."""


def multiplies_int8(device: str) -> bool:
    """Whether torchao has an int8 product for ``device``: ``cpu`` or ``cuda``.

    It chooses once, when it is imported: where Triton finds a GPU a Triton kernel, which no CPU runs; else
    ``torch._int_mm``, which CUDA takes for some shapes only.
    """
    import torch
    from torch.utils._triton import has_triton

    if device == "cpu":
        return not has_triton()
    return bool(has_triton() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY)


@contextmanager
def int8_products(model: nn.Module) -> Iterator[None]:
    """While this lasts, the ``torch.nn.Linear`` layers in the blocks of ``model`` multiply in int8.

    Args:
        model: a language model of transformers, not wrapped yet. Its output projection stays as it is.

    Raises:
        EngineError: it has no such layer, so that all of it would multiply in float.
    """
    from torch import nn
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    layers = block_linears(model, "matmul", "Use matmul float.")
    for layer in layers:
        layer.__class__, layer.config = _int8_linear(), Int8MixedPrecisionTrainingConfig()
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            del layer.config


def block_linears(model: nn.Module, field: str, cure: str, *, multiple: int = 1) -> list[Any]:
    """The plain ``torch.nn.Linear`` layers in the blocks of ``model``.

    Args:
        model: a language model of transformers.
        field: that asks for other products.
        cure: where there is no such layer.
        multiple: of which both widths of a layer have to be.

    Raises:
        EngineError: there is none, so that all of the model would multiply as before.
    """
    from torch import nn

    from compresskit.modeling.anatomy import anatomy_of

    linears = anatomy_of(model).linears.values()
    names = [
        n.name for n in linears if n.block and not (n.in_features % multiple or n.out_features % multiple)
    ]
    layers: list[Any] = [m for m in map(model.get_submodule, names) if type(m) is nn.Linear]
    if not layers:
        expected = "torch.nn.Linear layers in the model's blocks"
        if multiple > 1:
            expected += f", of widths that are multiples of {multiple}"
        raise EngineError(Fault(field, expected, "none", cure))
    return layers


@cache
def _int8_linear() -> type[Any]:
    """torchao's layer, which knows no autocast and has no float form for evaluations."""
    import torch
    from torch import nn
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingLinear

    class Int8Linear(Int8MixedPrecisionTrainingLinear):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            if not self.training:
                return nn.Linear.forward(self, input)
            kind = input.device.type
            if torch.is_autocast_enabled(kind):
                input = input.to(torch.get_autocast_dtype(kind))
            product: Tensor = super().forward(input.contiguous())
            return product.to(input.dtype)  # an fp32 bias would widen a bf16 product

    return Int8Linear
