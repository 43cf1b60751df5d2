"""What the ops of packed layouts do alike: whom they refuse, who computes them, their gradients.

Shapes: O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compresskit.kernels.bitmap import VALUE_TYPES
from compresskit.kernels.dispatch import implementation, reference
from compresskit.kernels.packed.base import Case

INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def type_refusal(case: Case) -> str:
    """Why the types of ``case`` are not multiplied by any packed layout; empty where they are."""
    for what, dtype, known in (
        ("values", case.values, VALUE_TYPES),
        ("inputs", case.inputs, INPUT_TYPES),
    ):
        if dtype not in known:
            names = ", ".join(str(one).removeprefix("torch.") for one in known)
            return f"{what} are {str(dtype).removeprefix('torch.')}, not one of {names}"
    return ""


def check_width(op: str, inputs: Tensor, words: int, word_inputs: int) -> None:
    """Refuse inputs of another width than the weight's, which packed words tell but for the last one.

    Raises:
        ValueError: they differ.
    """
    width = inputs.shape[-1]
    if -(-width // word_inputs) != words:
        least = (words - 1) * word_inputs + 1
        raise ValueError(f"{op}: the weight has {least} to {words * word_inputs} inputs, the inputs {width}")


def runner(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function that computes ``op``; in float64, which is for checks, that is the reference."""
    if dtype == torch.float64:
        return reference(op)
    return implementation(op, device.type)


def gradients(
    ctx: Any, grad: Tensor, weight_of: Callable[[], Tensor], arguments: int
) -> tuple[Tensor | None, ...]:
    """Of an op whose first argument is the inputs and whose last is the bias; weights are frozen.

    Args:
        ctx: has ``bias_type``, None without a bias.
        grad: (..., O), of the output.
        weight_of: the dense weight (O, I) in the type of ``grad``.
        arguments: how many the op has.
    """
    to_inputs = grad @ weight_of() if ctx.needs_input_grad[0] else None
    to_bias = None
    if ctx.bias_type is not None and ctx.needs_input_grad[arguments - 1]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_type)
    return (to_inputs, *(None for _ in range(arguments - 2)), to_bias)
