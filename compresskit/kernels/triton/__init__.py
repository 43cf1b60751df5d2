"""Twins of the ops of packed layouts in Triton: for GPUs of any maker, and for the CPU as an interpreter.

They are portable rather than fast: where an NVIDIA GPU has a layout of its own, that is faster.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def refusal(op: str) -> str:
    """Why these kernels cannot be had on this machine, as a phrase; empty where they can.

    Args:
        op: any of them: they need the same.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU, and TRITON_INTERPRET=1 is not set"
    return ""
