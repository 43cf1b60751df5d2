"""Many tokens: a block of rows is made dense, and torch multiplies by it while it lies in a cache.

Shapes: N = tokens, O = outputs, I = inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from compresskit.kernels.cpu.library import Rows, expand, linear

MOST_TOKENS = 64
"""Above this many the decoding of a weight counts for nothing beside its products."""
BLOCK_BYTES = 4 << 20


def linear_or_expand(op: str, inputs: Tensor, weight: Rows, bias_O: Tensor | None) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O): by the kernel, or block by block of dense rows.

    Values that the inputs' type cannot say exactly are left to the kernel, whatever the number of tokens.
    """
    width, outs, values = inputs.shape[-1], weight.words_OW.shape[0], weight.values.dtype
    exact = inputs.dtype in (values, torch.float32)
    if inputs.numel() <= MOST_TOKENS * width or not exact:
        return linear(op, inputs, weight, bias_O)
    inputs_NI = inputs.reshape(-1, width).contiguous()
    out_NO = torch.empty(len(inputs_NI), outs, dtype=inputs.dtype, device="cpu")
    rows = max(1, BLOCK_BYTES // (width * inputs.itemsize))
    block = torch.empty(min(rows, outs), width, dtype=inputs.dtype, device="cpu")
    bias_O = None if bias_O is None else bias_O.to(inputs.dtype)
    for first in range(0, outs, rows):
        last = min(first + rows, outs)
        dense_RI = block[: last - first]
        expand(op, weight.part(first, last), dense_RI)
        bias_R = None if bias_O is None else bias_O[first:last]
        out_NO[:, first:last] = dense_linear(inputs_NI, dense_RI, bias_R)
    return out_NO.view(*inputs.shape[:-1], outs)
