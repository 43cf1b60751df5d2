"""How many bits, and what shares a scale. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compresskit.errors import Fault, SchemeError
from compresskit.registry import nearest

DEFAULT_GROUP_SIZE = 128  # what vLLM's and llm-compressor's W4A16 mean
KNOWN = ("w8a8", "w8a16", "w4a16", "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-channel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A grid's form, before any weight is seen. ``str()`` parses back.

    Attributes:
        weight_bits: 4 or 8.
        group_size: inputs that share a scale; None: all of a row.
        activation_bits: 8 rounds each layer's input per token as the model runs; None leaves it alone.
    """

    weight_bits: int
    group_size: int | None = None
    activation_bits: int | None = None

    def __str__(self) -> str:
        text = f"w{self.weight_bits}a{self.activation_bits or 16}"
        if self.group_size is not None:
            text += f"-g{self.group_size}"
        elif self.weight_bits == 4:
            text += "-channel"
        return text

    def misfit(self, in_features: int) -> str:
        """What a weight with other in_features would need; empty if it fits."""
        if self.group_size is None or in_features % self.group_size == 0:
            return ""
        return f"in_features divisible by the group size {self.group_size}"

    def bits_per_weight(self, in_features: int, scale_bits: int) -> float:
        """Bits one weight takes when stored, its share of scales included.

        Args:
            in_features: of the layer.
            scale_bits: of the model's dtype: 16 or 32.

        Returns:
            E.g. 4.125 for ``w4a16-g128`` in bfloat16.
        """
        return self.weight_bits + scale_bits / (self.group_size or in_features)


def parse(text: str, *, where: str = "scheme") -> Scheme:
    """Read ``w8a8``, ``w8a16``, ``w4a16`` (groups of 128), ``w4a16-g32``, ``w4a16-channel``, in any case.

    Args:
        text: what the recipe says.
        where: the place to name in an error.

    Returns:
        The scheme; ``str()`` of it parses back to an equal one.

    Raises:
        SchemeError: no such scheme; the message lists near ones.
    """
    plain = str(text).strip().lower().replace("_", "-")
    found = re.fullmatch(r"w(8)a(8|16)|w(4)a(16)(?:-(channel|g([1-9]\d*)))?", plain)
    if not found:
        raise SchemeError(
            Fault(where, "a quantisation scheme", repr(text), f"Did you mean: {nearest(plain, KNOWN)}?")
        )
    eight, activation, _four, _, grouping, group = found.groups()
    if eight:
        return Scheme(weight_bits=8, activation_bits=8 if activation == "8" else None)
    size = None if grouping == "channel" else int(group or DEFAULT_GROUP_SIZE)
    return Scheme(weight_bits=4, group_size=size)
