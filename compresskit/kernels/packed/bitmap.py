"""The layout ``bitmap``: 64 inputs to a word of mask bits, and the kept values row by row.

A kernel reads a word, takes as many values as it has ones, and puts each where its one is. Nothing else says
where a value belongs but the start of its row. For zeros that lie anywhere.

Shapes: O = outputs, I = inputs, W = words of a row = ceil(I / 64), K = kept weights, S = K and the slack,
G = groups of inputs that share a scale, N = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels.bitmap import Bitmap, kept_per_row
from compresskit.kernels.packed.base import SLACK_BYTES, Case, Packed
from compresskit.kernels.packed.rules import check_width, complete, runner, type_refusal

WORD_BITS = 64


@dataclass(frozen=True, slots=True)
class BitmapRows:
    """The tensors are, in this order:

    * words_OW: int64; bit ``i % 64`` (the lowest first) of word ``i // 64`` says whether input i is kept.
    * values_S: the kept values row by row, then ``SLACK_BYTES`` of zeros: a kernel may read 64 bytes from
      where any value begins. They have a gradient. Without slack they are taken too, and copied where their
      storage ends with them and a kernel needs it.
    * starts: int64 (O + 1,); row o has the values from ``starts[o]`` to ``starts[o + 1]``.
    * scales_OG: fp32, of int8 values; (O, 0) for other values.
    """

    op: str = "bitmap_linear"

    def refusal(self, case: Case) -> str:
        """Why it cannot multiply in such a case; empty where it can."""
        return type_refusal(case)

    def pack(self, weight: Bitmap, device: torch.device) -> Packed:
        """``weight`` in this layout on ``device``."""
        mask_OB, values_K = weight.mask_OB.cpu(), weight.values_K.cpu()
        words_OW = pad(mask_OB, (0, -mask_OB.shape[1] % 8)).contiguous().view(torch.int64)
        starts = pad(kept_per_row(mask_OB).cumsum(0), (1, 0))
        values_S = pad(values_K, (0, SLACK_BYTES // values_K.itemsize))
        scales_OG = weight.scales_OG
        if scales_OG is None:
            scales_OG = torch.empty(weight.out_features, 0, device="cpu")
        return tuple(t.to(device) for t in (words_OW, values_S, starts, scales_OG.float().contiguous()))

    def unpack(self, packed: Packed, in_features: int) -> Bitmap:
        """What was packed, equal to the bit, on the CPU."""
        words_OW, values_S, starts, scales_OG = (tensor.cpu() for tensor in packed)
        return Bitmap(
            mask_OB=words_OW.view(torch.uint8)[:, : -(-in_features // 8)].contiguous(),
            values_K=values_S[: int(starts[-1])].clone(),
            in_features=in_features,
            scales_OG=scales_OG if scales_OG.shape[1] else None,
        )

    def linear(self, inputs: Tensor, packed: Packed, bias_O: Tensor | None) -> Tensor:
        """``inputs @ weight.T + bias``, (..., O) in the inputs' type; sums are taken in fp32 at least.

        float64 is there for checks: the reference alone computes in it.
        """
        out: Tensor = bitmap_linear(inputs, *packed, bias_O)
        return out


@torch.library.custom_op("compresskit::bitmap_linear", mutates_args=())
def bitmap_linear(
    inputs: Tensor,
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """The op of this layout; see :class:`BitmapRows` for the arguments.

    Raises:
        ValueError: inputs of another width than the weight's.
    """
    check_width("bitmap_linear", inputs, words_OW.shape[1], WORD_BITS)
    run = runner("bitmap_linear", inputs.device, inputs.dtype)
    return run(inputs, words_OW, values_S, starts, scales_OG, bias_O)


@torch.library.custom_op("compresskit::bitmap_expand", mutates_args=())
def bitmap_expand(
    words_OW: Tensor,
    values_S: Tensor,
    starts: Tensor,
    scales_OG: Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight (O, I) in ``dtype``, int8 values multiplied by their scales."""
    run = runner("bitmap_expand", words_OW.device, dtype)
    return run(words_OW, values_S, starts, scales_OG, in_features, dtype)


@torch.library.custom_op("compresskit::bitmap_gradient", mutates_args=())
def bitmap_gradient(
    grad: Tensor, inputs: Tensor, words_OW: Tensor, values_S: Tensor, starts: Tensor, scales_OG: Tensor
) -> Tensor:
    """The gradient of ``values_S``, in its type, from that of the outputs; the slack has zeros."""
    run = runner("bitmap_gradient", inputs.device, inputs.dtype)
    with torch.autocast(inputs.device.type, enabled=False):  # it would make products in fp32 narrow again
        return run(grad, inputs, words_OW, values_S, starts, scales_OG)


complete(
    bitmap_linear,
    bitmap_expand,
    outputs=lambda packed: packed[0].shape[0],
    gradient=bitmap_gradient,
    values=1,
)
