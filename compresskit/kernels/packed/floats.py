"""What the layouts of CUDA's kernels do alike: whom they refuse, and how they mark what only fills up.

They keep 16-bit floats. What fills a layout up is -0.0, which changes no sum; a kept -0.0 becomes 0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.dispatch import refusal
from compresskit.kernels.packed.base import Case

FILLED = -0.0
FLOAT16 = (torch.bfloat16, torch.float16)


def cuda_refusal(case: Case, op: str) -> str:
    """Why ``case`` is not for CUDA's kernels of 16-bit floats; empty where it is.

    Args:
        case: what is to be multiplied.
        op: that has to be had on this machine.
    """
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT16)
    if case.device != "cuda":
        return f"it is made for CUDA's kernels, and the device is {case.device}"
    if case.values not in FLOAT16:
        return f"values are {str(case.values).removeprefix('torch.')}, not {names}"
    if case.inputs != case.values:
        types = (str(dtype).removeprefix("torch.") for dtype in (case.inputs, case.values))
        return "inputs are {}, the values {}".format(*types)
    return refusal("cuda", op)


def filled_zeros(values: Tensor) -> Tensor:
    """``values`` with every -0.0 made 0.0, so that only what fills up is -0.0."""
    return torch.where(values == 0, torch.zeros_like(values), values)


def is_filling(values: Tensor) -> Tensor:
    """bool: which of ``values`` only fill up."""
    return (values == 0) & values.signbit()
