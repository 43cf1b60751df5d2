"""What the fused losses share: hidden states to logits, a few tokens at a time, and back.

Shapes: N = tokens, D = hidden width, V = vocabulary, C = tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.kernels.chunking import block_tokens, chunk_tokens


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums and softmaxes are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(num_tokens: int, vocabulary: int, device: str, chunk: int) -> Iterator[slice]:
    """Cut ``num_tokens`` into slices of ``chunk`` tokens; 0 chooses by the size of the vocabulary."""
    step = chunk or chunk_tokens(vocabulary, device)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Cut the tokens of a chunk into those whose logits are looked at together."""
    num_tokens, vocabulary = logits_CV.shape
    step = block_tokens(vocabulary, logits_CV.device.type)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


@dataclass(frozen=True, slots=True)
class Projection:
    """An output projection in the type of the hidden states it is applied to.

    Attributes:
        head_VD: weight, in the hidden states' dtype.
        bias_V: or None.
        softcap: bound of the logits, ``softcap * tanh(logits / softcap)``; 0 for none.
    """

    head_VD: Tensor
    bias_V: Tensor | None
    softcap: float

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, V) in the accumulator's dtype."""
        logits_CV = (hidden_CD @ self.head_VD.T).to(accumulator(hidden_CD.dtype))
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.softcap:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV

    def through_softcap(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """The gradient before the softcap, from that after it."""
        return grad_CV * (1 - (logits_CV / self.softcap) ** 2) if self.softcap else grad_CV


@dataclass(frozen=True, slots=True)
class Gradients:
    """Sums of the gradients over chunks, all in the accumulator's dtype; empty where none were asked for."""

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor

    @classmethod
    def zeros(cls, hidden_ND: Tensor, head_VD: Tensor, wanted: bool) -> Gradients:
        """Room for the gradients of ``hidden_ND`` and ``head_VD``."""
        rows, like = int(wanted), {"dtype": accumulator(hidden_ND.dtype), "device": hidden_ND.device}
        return cls(
            torch.zeros(hidden_ND.shape[0] * rows, hidden_ND.shape[1], **like),  # type: ignore[call-overload]
            torch.zeros(head_VD.shape[0] * rows, head_VD.shape[1], **like),  # type: ignore[call-overload]
            torch.zeros(head_VD.shape[0] * rows, **like),  # type: ignore[call-overload]
        )

    def add(self, part: slice, hidden_CD: Tensor, projection: Projection, grad_CV: Tensor) -> None:
        """Carry ``grad_CV``, of the logits of tokens ``part``, back through the projection."""
        # fp16 would flush the many tiny entries of a softmax to zero; bf16 has the range of fp32.
        narrow = hidden_CD.dtype if hidden_CD.dtype != torch.float16 else torch.float32
        grad = grad_CV.to(narrow)
        self.hidden_ND[part] = (grad @ projection.head_VD.to(narrow)).to(self.hidden_ND.dtype)
        hidden_CD = hidden_CD.to(narrow)
        if narrow == self.head_VD.dtype:
            self.head_VD.addmm_(grad.T, hidden_CD)
        else:
            for part in chunks(self.head_VD.shape[0], self.head_VD.shape[1], grad.device.type, 0):
                self.head_VD[part].add_(grad.T[part] @ hidden_CD)
        self.bias_V.add_(grad_CV.sum(0))
