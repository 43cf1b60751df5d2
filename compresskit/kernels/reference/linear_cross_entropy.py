"""Next-token cross entropy, fused with the output projection.

For each token -log q_label with q the softmax of the logits. No (N, V) tensor is ever whole: tokens are taken
a few at a time and their gradients are computed on the spot.

Paper: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024,
https://arxiv.org/abs/2411.09009 (the idea; this is plain torch).

Shapes: N = tokens, D = hidden width, V = vocabulary, C = tokens of one chunk, B = tokens of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.kernels.reference.projection import Gradients, Projection, accumulator, blocks, chunks


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    softcap: float,
    chunk: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the cross entropy over all tokens, in nats, and its gradients.

    Args:
        hidden_ND: (N, D), any float dtype; matrix products run in it, sums in fp32 (or fp64).
        head_VD: (V, D).
        bias_V: (V,) or None.
        labels_N: int64 (N,), each in [0, V).
        softcap: bound of the logits; 0 for none.
        chunk: tokens at a time; 0 chooses.
        with_gradients: else the gradients come back empty.

    Returns:
        The sum, and the gradients of the hidden states, head and bias, in fp32 (or fp64).
    """
    projection = Projection(head_VD.to(hidden_ND.dtype), bias_V, softcap)
    total = hidden_ND.new_zeros((), dtype=accumulator(hidden_ND.dtype))
    gradients = Gradients.zeros(hidden_ND, head_VD, with_gradients)
    for part in chunks(hidden_ND.shape[0], head_VD.shape[0], hidden_ND.device.type, chunk):
        logits_CV = projection.logits(hidden_ND[part])
        for block in blocks(logits_CV):
            logits_BV, at_label = logits_CV[block], labels_N[part][block, None]
            log_q_BV = logits_BV.log_softmax(-1)
            total -= log_q_BV.gather(-1, at_label).sum()
            if with_gradients:
                grad_BV = log_q_BV.exp_()
                grad_BV.scatter_add_(-1, at_label, torch.full_like(at_label, -1, dtype=grad_BV.dtype))
                logits_BV.copy_(projection.through_softcap(grad_BV, logits_BV))
        if with_gradients:
            gradients.add(part, hidden_ND[part], projection, logits_CV)
    return total, gradients.hidden_ND, gradients.head_VD, gradients.bias_V
