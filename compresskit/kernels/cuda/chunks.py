"""What the skinny kernels' launchers do alike: tokens in turns, inputs in chunks, chunks put together.

Shapes: N = tokens, O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.launch import Machine

WARPS = 8
THREADS = WARPS * 32
STRIP = 16
STRIDE_BYTES = 20 * 4
PIECE = 8
"""Inputs in 16 bytes."""
FLOAT16 = {torch.bfloat16: 1, torch.float16: 0}
"""Type -> whether it is BF16, as the sources want to be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a product is divided among blocks of threads.

    Attributes:
        blocks: that take strips of outputs in turns, for each chunk.
        chunks: of the inputs.
        chunk_steps: steps of inputs in a chunk, except the last.
        shared_bytes: of a block.
    """

    blocks: int
    chunks: int
    chunk_steps: int
    shared_bytes: int


def token_blocks(tokens: int, most: int) -> int:
    """How many blocks of 8 tokens a kernel is compiled for: the next power of two, at most ``most``."""
    return min(most, 1 << (-(-tokens // 8) - 1).bit_length())


@cache
def split(
    machine: Machine, *, strips: int, steps: int, step_bytes: int, fixed_bytes: int, round_steps: int
) -> Split:
    """Chunks as large as shared memory takes, and as many blocks as find room at once.

    Args:
        machine: the GPU.
        strips: of 16 outputs.
        steps: of inputs.
        step_bytes: what the inputs of a step take in shared memory.
        fixed_bytes: what a block takes besides.
        round_steps: a chunk should have a multiple of so many steps.
    """
    room = (machine.two_blocks_bytes - fixed_bytes) // step_bytes
    resident = 2
    if room < min(steps, round_steps):  # one large block rather than many small chunks
        room, resident = (machine.block_shared_bytes - fixed_bytes) // step_bytes, 1
    chunk_steps = max(1, min(room, steps))
    if chunk_steps < steps:
        even = -(-steps // -(-steps // chunk_steps))
        rounded = -(-even // round_steps) * round_steps
        chunk_steps = rounded if rounded <= room else even
    chunks = -(-steps // chunk_steps)
    return Split(
        blocks=max(1, min(strips, -(-machine.multiprocessors * resident // chunks))),
        chunks=chunks,
        chunk_steps=chunk_steps,
        shared_bytes=fixed_bytes + chunk_steps * step_bytes,
    )


def check_types(op: str, inputs: Tensor, values: Tensor) -> None:
    """Refuse inputs of another type than the values'.

    Raises:
        ValueError: they differ, or are no 16-bit floats.
    """
    if inputs.dtype != values.dtype or inputs.dtype not in FLOAT16:
        raise ValueError(f"{op}: inputs are {inputs.dtype}, values {values.dtype}; both must be bf16 or fp16")


def in_turns(
    inputs: Tensor,
    outputs: int,
    bias_O: Tensor | None,
    most: int,
    run: Callable[[Tensor, Tensor | None, Tensor], None],
) -> Tensor:
    """``run(inputs_NI, bias_O, out_NO)`` on at most ``most`` tokens at a time, for inputs of any shape.

    Args:
        inputs: (..., I), any strides; ``run`` gets whole pieces of 16 bytes, and aligned so.
        outputs: O.
        bias_O: of any type, or None.
        most: tokens.
        run: writes all of ``out_NO``.

    Returns:
        (..., O) in the inputs' type.
    """
    rows_NI = inputs.reshape(-1, inputs.shape[-1])
    if rows_NI.shape[1] % PIECE:
        rows_NI = torch.nn.functional.pad(rows_NI, (0, -rows_NI.shape[1] % PIECE))
    rows_NI = rows_NI.contiguous()
    if rows_NI.data_ptr() % 16:
        rows_NI = rows_NI.clone()
    bias_O = None if bias_O is None else bias_O.to(inputs.dtype).contiguous()
    out_NO = torch.empty(len(rows_NI), outputs, dtype=inputs.dtype, device=inputs.device)
    if outputs:
        for first in range(0, len(rows_NI), most):
            run(rows_NI[first : first + most], bias_O, out_NO[first : first + most])
    return out_NO.reshape(*inputs.shape[:-1], outputs)


def room_for_parts(chunks: int, out_NO: Tensor) -> Tensor | None:
    """(chunks, N, O) fp32 where there are several chunks."""
    return out_NO.new_empty((chunks, *out_NO.shape), dtype=torch.float32) if chunks > 1 else None


def put_together(parts: Tensor | None, bias_O: Tensor | None, out_NO: Tensor) -> None:
    """Sum what the chunks gave, where there are several."""
    if parts is None:
        return
    defines = {"BF16": FLOAT16[out_NO.dtype]}
    grid = (-(-out_NO.numel() // 256), 1)
    launch.start("parts_sum", defines, grid, 256, 0, [parts, bias_O, out_NO, len(parts), *out_NO.shape])
