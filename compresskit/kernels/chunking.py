"""How much of what is never whole is alive at once: tokens' logits in the fused losses, rows of a weight's
gradient in packed layers. No torch: a forecast asks, too."""

from __future__ import annotations

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits that are multiplied together, of each model."""
MIN_CHUNK = 128
"""Tokens. With fewer, reading the head and adding to its gradient takes longer than the products."""
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that are looked at together: on a CPU they should stay in its cache, and a GPU must be kept busy."""
BLOCK_COPIES = 6
"""About what a loss makes of a block's logits before it is done with them; one that sorts makes more."""


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits are multiplied together."""
    return max(MIN_CHUNK, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // vocabulary)


def block_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits are looked at together."""
    return max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"]) // vocabulary)


def gradient_rows(in_features: int, device: str) -> int:
    """Rows of a weight's gradient that are dense together."""
    return block_tokens(in_features, device)


def loss_bytes(tokens: int, vocabulary: int, width: int, device: str, *, models: int = 2) -> int:
    """What a fused loss on so many tokens holds at its peak, the head's gradient among it.

    Args:
        tokens: of the batch.
        vocabulary: V, of the student.
        width: of the student's hidden states.
        device: ``cpu`` or ``cuda``.
        models: 2 with a teacher, else 1.
    """
    if not vocabulary:
        return 0
    chunk, block = (min(tokens, of(vocabulary, device)) for of in (chunk_tokens, block_tokens))
    return 4 * vocabulary * (models * chunk + BLOCK_COPIES * block + width)
