"""Where zeros may go: the rules, and the texts they are read from."""

from __future__ import annotations

from compresskit.sparse.pattern.base import MAX_SENTENCES, Pattern, at_most, percent, require_fit
from compresskit.sparse.pattern.block import Block
from compresskit.sparse.pattern.nm import NM
from compresskit.sparse.pattern.select import smallest
from compresskit.sparse.pattern.text import parse_pattern
from compresskit.sparse.pattern.unstructured import LayerUnstructured, RowUnstructured

__all__ = [
    "MAX_SENTENCES",
    "NM",
    "Block",
    "LayerUnstructured",
    "Pattern",
    "RowUnstructured",
    "at_most",
    "parse_pattern",
    "percent",
    "require_fit",
    "smallest",
]
