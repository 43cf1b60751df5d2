"""Bits per byte of a language model and of gzip on the same documents.

Shapes: L = tokens of one document, T = context length, S = tokens scored in one window.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one model makes of some documents.

    Attributes:
        documents: how many.
        num_bytes: of all documents in UTF-8; every one is counted.
        num_tokens: scored.
        nats: summed over the scored tokens.
    """

    documents: int
    num_bytes: int
    num_tokens: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for one byte of the text."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nats / self.num_tokens


def windows(length: int, context: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``length`` tokens into windows that score every token after the first exactly once.

    Args:
        length: L, tokens of the document, its BOS included.
        context: T, tokens that the model reads at most.
        overlap: tokens at the head of each window but the first that are read again and not scored.

    Yields:
        ``(begin, first, end)``: the model reads tokens begin..end and its predictions of tokens
        first..end are scored.
    """
    first = 1
    while first < length:
        begin = 0 if first == 1 else first - overlap
        end = min(length, begin + context)
        yield begin, first, end
        first = end


@torch.no_grad()
def score(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], *, context: int, overlap: int = 128
) -> Score:
    """Score every token of ``texts``; a text longer than the context is read in windows.

    Args:
        model: a causal language model of transformers, on the CPU or a GPU.
        tokenizer: the model's; it has to put BOS before a text, for the first byte to be scored.
        texts: the documents.
        context: T.
        overlap: tokens of each window after the first that are context only, below T.

    Raises:
        ValueError: the tokenizer adds no BOS, or ``overlap`` is not in [1, context).
    """
    if not 1 <= overlap < context:
        raise ValueError(f"overlap {overlap} is not in [1, {context})")
    model.eval()
    device = next(model.parameters()).device
    documents = num_bytes = num_tokens = 0
    nats = 0.0
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if ids[0] != tokenizer.bos_token_id:
            raise ValueError("the tokenizer puts no BOS before a text; its first byte cannot be scored")
        tokens_L = torch.tensor(ids, device=device)
        for begin, first, end in windows(len(ids), context, overlap):
            logits = model(input_ids=tokens_L[None, begin:end], use_cache=False).logits[0].float()
            picked = logits[first - begin - 1 : end - begin - 1]
            nats += float(nn.functional.cross_entropy(picked, tokens_L[first:end], reduction="sum"))
        documents += 1
        num_bytes += len(text.encode())
        num_tokens += len(ids) - 1
    return Score(documents=documents, num_bytes=num_bytes, num_tokens=num_tokens, nats=nats)


def gzip_bits_per_byte(texts: Iterable[str], *, together: bool = False) -> float:
    """Bits that ``gzip -9`` needs for one byte of ``texts``, each by itself or all in one stream."""
    bodies = [text.encode() for text in texts]
    parts = [b"".join(bodies)] if together else bodies
    packed = sum(len(gzip.compress(part, compresslevel=9, mtime=0)) for part in parts)
    return 8 * packed / sum(len(part) for part in parts)
