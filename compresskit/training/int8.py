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

from compresskit.training.swapped import block_linears, swapped, to_autocast

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
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    layers = block_linears(model, "matmul", "Use matmul float.")
    with swapped(layers, _int8_linear(), {"config": Int8MixedPrecisionTrainingConfig()}):
        yield


@cache
def _int8_linear() -> type[Any]:
    """torchao's layer, which knows no autocast and has no float form for evaluations."""
    from torch import nn
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingLinear

    class Int8Linear(Int8MixedPrecisionTrainingLinear):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            if not self.training:
                return nn.Linear.forward(self, input)
            input = to_autocast(input)
            product: Tensor = super().forward(input.contiguous())
            return product.to(input.dtype)  # an fp32 bias would widen a bf16 product

    return Int8Linear
