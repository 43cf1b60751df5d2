"""What patterns are read from."""

from __future__ import annotations

import re

from compresskit.sparse.pattern.base import Pattern, refuse
from compresskit.sparse.pattern.block import Block
from compresskit.sparse.pattern.nm import NM
from compresskit.sparse.pattern.unstructured import LayerUnstructured, RowUnstructured


def parse_pattern(text: str, *, where: str = "pattern") -> Pattern:
    """Read ``2:4``, ``50%``, ``0.5``, ``50%:row``, ``50%:layer`` or ``50%:16x16``, in any case.

    N:M and blocks may end in ``:pad``.

    Args:
        text: what the recipe says.
        where: the place to name in an error.

    Returns:
        The pattern; ``str()`` of it parses back to an equal one.

    Raises:
        PatternError: the text is none of these, or leaves nothing to zero or nothing to keep.
    """
    plain = str(text).strip().lower().replace(" ", "")
    if found := re.fullmatch(r"(\d+):(\d+)(:pad)?", plain):
        keep, of = int(found[1]), int(found[2])
        if not 0 < keep < of:
            refuse(where, text, "N:M with 0 < N < M, such as 2:4")
        return NM(keep, of, pad=bool(found[3]))
    shape = r"row|layer|(\d+)x(\d+)(:pad)?"
    found = re.fullmatch(rf"(?:(\d+(?:\.\d+)?)%|(0?\.\d+))(?::({shape}))?", plain)
    if not found:
        refuse(where, text, "a pattern such as 50%, 0.5, 50%:layer, 50%:16x16 or 2:4")
    percent, fraction, scope, rows, columns, pad = found.groups()
    zero_fraction = float(percent) / 100 if percent else float(fraction)
    if not 0 < zero_fraction < 1:
        refuse(where, text, "more than 0% and less than 100%")
    if rows:
        if not (int(rows) and int(columns)):
            refuse(where, text, "blocks of at least 1x1, such as 50%:16x16")
        return Block(zero_fraction, int(rows), int(columns), pad=bool(pad))
    return LayerUnstructured(zero_fraction) if scope == "layer" else RowUnstructured(zero_fraction)
