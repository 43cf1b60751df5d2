"""Every kernel as it is compiled: for checks, and to say what each takes."""

from __future__ import annotations

from collections.abc import Iterator

Variant = tuple[str, dict[str, int]]
TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")


def variants() -> Iterator[Variant]:
    """Source and defines of each."""
    for bf16 in (1, 0):
        yield "parts_sum", {"BF16": bf16}
        for blocks in (1, 2, 4, 8):
            yield "fragment_linear", {"BF16": bf16, "TOKEN_BLOCKS": blocks}
        for blocks in (1, 2):
            for slots in (3, 2):
                yield "tile_linear", {"BF16": bf16, "TOKEN_BLOCKS": blocks, "RING_SLOTS": slots}
        yield "tile_expand", {"BF16": bf16, "RING_SLOTS": 2}
        for tokens in (1, 2):
            for spread_bits in (4, 5):
                yield "gap_linear", {"BF16": bf16, "TOKENS": tokens, "SPREAD_BITS": spread_bits}
