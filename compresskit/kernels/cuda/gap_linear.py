"""Starts ``gap_linear.cu``. Shapes: ``packed/gap.py``; N = tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.chunks import FLOAT16, check_types, in_turns

MOST_TOKENS = 2
WARPS = 12
SLACK_INPUTS = 16
"""Past the last input: what fills a row's last groups up, and lanes without a group, look there."""
SPREAD_BITS = (4, 5)
DENSEST = 0.35
"""Share of kept weights from which the first spread has fewer lanes meet in a bank; found by simulation."""


def gap_linear(
    inputs: Tensor,
    values_G8: Tensor,
    gaps_G: Tensor,
    starts: Tensor,
    width_I0: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O); sums are taken in fp32.

    Args:
        inputs: (..., I) on a GPU, of the values' type.
        values_G8, gaps_G, starts, width_I0: the packed weight.
        bias_O: of any type, or None.

    Raises:
        ValueError: inputs and values differ in type.
    """
    check_types("gap_linear", inputs, values_G8)
    width, outputs = width_I0.shape[0], starts.shape[0] - 1
    spread_bits = SPREAD_BITS[values_G8.numel() < DENSEST * outputs * width]
    shared_bytes = _pitch(width, spread_bits) * 4 << spread_bits

    def run(inputs_NI: Tensor, bias_O: Tensor | None, out_NO: Tensor) -> None:
        machine = launch.machine(inputs.device.index or 0)
        resident = 2 if shared_bytes <= machine.two_blocks_bytes else 1
        blocks = min(-(-outputs // WARPS), machine.multiprocessors * resident)
        defines = {
            "BF16": FLOAT16[inputs.dtype],
            "TOKENS": len(inputs_NI),
            "SPREAD_BITS": spread_bits,
        }
        sizes = [_pitch(width, spread_bits), width, inputs_NI.shape[1], outputs]
        launch.start(
            "gap_linear",
            defines,
            (blocks, 1),
            WARPS * 32,
            shared_bytes,
            [values_G8, gaps_G, starts, inputs_NI, bias_O, out_NO, *sizes],
        )

    return in_turns(inputs, outputs, bias_O, MOST_TOKENS, run)


def width_refusal(inputs: int) -> str:
    """Why so many inputs are too many for the current GPU's shared memory; empty where they are not."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    room = launch.machine(index).block_shared_bytes
    needed = max(_pitch(inputs, bits) * 4 << bits for bits in SPREAD_BITS)
    return f"{inputs} inputs take {needed} bytes of shared memory, of {room}" if needed > room else ""


def _pitch(inputs: int, spread_bits: int) -> int:
    """Words of a row of staged inputs: a multiple of the 32 banks."""
    return -(-(inputs + SLACK_INPUTS) // (32 << spread_bits)) * 32
