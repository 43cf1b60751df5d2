"""Products in fp8 while a model trains (torchao's float8 training), everything else in bf16.

Weights stay what they are; a layer scales what it multiplies, forward and backward, to e4m3 or e5m2 by the
largest number in each tensor. Only the class of a layer is swapped, so engines, state dicts and held zeros
see plain parameters.

Paper: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from compresskit.training.swapped import block_linears, swapped, to_autocast

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST_CAPABILITY = (8, 9)
"""Of an NVIDIA GPU whose tensor cores multiply fp8."""
MULTIPLE = 16
"""Of both widths of a layer whose product can be in fp8."""


def multiplies_fp8(device: str) -> bool:
    """Whether ``device``, ``cpu`` or ``cuda``, has products in fp8."""
    import torch

    found = device == "cuda" and torch.cuda.is_available()
    return found and torch.cuda.get_device_capability() >= LEAST_CAPABILITY


@contextmanager
def fp8_products(model: nn.Module, *, emulate: bool = False) -> Iterator[None]:
    """While this lasts, the ``torch.nn.Linear`` layers in the blocks of ``model`` multiply in fp8.

    Args:
        model: a language model of transformers, not wrapped yet. Its output projection stays as it is.
        emulate: whether to round to fp8 and multiply in the wider type, for a device without such products.

    Raises:
        EngineError: it has no such layer of widths that are multiples of 16.
    """
    from torch import nn
    from torchao.float8 import Float8LinearConfig

    found = block_linears(model, "precision", "Use precision bf16.", multiple=MULTIPLE)
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    kind = _fp8_linear()
    made = kind(MULTIPLE, MULTIPLE, bias=False, config=config, device="meta")
    own = {name: value for name, value in vars(made).items() if name not in vars(nn.Linear(1, 1))}
    with swapped(found, kind, own):
        yield


@cache
def _fp8_linear() -> type[Any]:
    """torchao's layer, which knows no autocast of a CPU and has no wider form for evaluations."""
    import torch
    from torch import nn
    from torchao.float8.float8_linear import Float8Linear

    class Fp8Linear(Float8Linear):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            if not self.training:
                return nn.Linear.forward(self, input)
            input = to_autocast(input)
            with torch.autocast(input.device.type, enabled=False):
                product: Tensor = super().forward(input)
            return product

    return Fp8Linear
