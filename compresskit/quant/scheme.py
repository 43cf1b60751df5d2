"""How many bits, of what kind, and what shares a scale. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.errors import Fault, SchemeError
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.formats.grid import Grid

DEFAULT_GROUP_SIZE = 128  # what vLLM's and llm-compressor's W4A16 mean
NF4_GROUP_SIZE = 64  # of bitsandbytes
KNOWN = (
    "w8a8",
    "w8a8-static",
    "w8a16",
    "w4a16",
    "w4a16-g32",
    "w4a16-g64",
    "w4a16-g128",
    "w4a16-channel",
    "w4a16-g32-asym",
    "w4a16-g128-asym",
    "w4a8",
    "w4a8-g32",
    "w4a8-channel",
    "fp8",
    "nf4",
)
ALIASES = {"fp8-dynamic": "fp8", "int8": "w8a8", "w8a8-dynamic": "w8a8", "w4a16-asym": "w4a16-g128-asym"}
FORM = re.compile(r"w([48])a(8|16)(?:-(channel|g[1-9]\d*))?(?:-(asym|static))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A grid's form, before any weight is seen. ``str()`` parses back.

    Attributes:
        weight_bits: 4 or 8.
        number: ``int``; ``float`` is e4m3; ``nf4`` the 16 quantiles of a normal distribution.
        group_size: inputs that share a scale; None: all of a row.
        symmetric: whether 0 is the middle of the range; otherwise each group has a zero point.
        activation_bits: 8 rounds each layer's input as the model runs, to the weights' kind of number; None
            leaves it alone.
        static: whether one scale for all inputs of a layer is fixed by calibration; otherwise each token's
            own is found as the model runs.
    """

    weight_bits: int
    number: str = "int"
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int | None = None
    static: bool = False

    def __str__(self) -> str:
        if self.number != "int":
            return "fp8" if self.number == "float" else "nf4"
        text = f"w{self.weight_bits}a{self.activation_bits or 16}"
        if self.group_size is not None:
            text += f"-g{self.group_size}"
        elif self.weight_bits == 4:
            text += "-channel"
        return text + ("" if self.symmetric else "-asym") + ("-static" if self.static else "")

    def misfit(self, in_features: int) -> str:
        """What a weight with other in_features would need; empty if it fits."""
        if self.group_size is None or in_features % self.group_size == 0:
            return ""
        return f"in_features divisible by the group size {self.group_size}"

    def bits_per_weight(self, in_features: int, scale_bits: int) -> float:
        """Bits one weight takes when stored, its share of scales and zero points included.

        Args:
            in_features: of the layer.
            scale_bits: of the model's dtype: 16 or 32.

        Returns:
            E.g. 4.125 for ``w4a16-g128`` in bfloat16. ``w4a8`` is stored as int8.
        """
        if self.number == "nf4":
            scale_bits = 32
        stored = 8 if self.activation_bits else self.weight_bits
        zero_bits = 0 if self.symmetric else self.weight_bits
        return stored + (scale_bits + zero_bits) / (self.group_size or in_features)


def parse(text: str, *, where: str = "scheme") -> Scheme:
    """Read a scheme's name, in any case.

    Args:
        text: ``w8a8``, ``w8a16``, ``w4a16`` (groups of 128), ``w4a16-g32``, ``w4a16-channel``, ``w4a8`` (the
            same groups), ``w4a16`` also with ``-asym``, ``w8a8-static``, ``fp8`` or ``nf4``.
        where: the place to name in an error.

    Returns:
        The scheme; ``str()`` of it parses back to an equal one.

    Raises:
        SchemeError: no such scheme; the message lists near ones.
    """
    plain = str(text).strip().lower().replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain == "fp8":
        return Scheme(weight_bits=8, number="float", activation_bits=8)
    if plain == "nf4":
        return Scheme(weight_bits=4, number="nf4", group_size=NF4_GROUP_SIZE)
    found = FORM.fullmatch(plain)
    weight, activation, grouping, last = found.groups() if found else ("", "", None, None)
    eight = activation == "8"
    # No runtime multiplies int8 by int8 in groups; bfloat16 cannot tell 256 levels about a zero point apart.
    w8a8, w4a16 = eight and weight == "8", weight == "4" and not eight
    if not found or (grouping and w8a8) or (last == "static" and not w8a8) or (last == "asym" and not w4a16):
        raise SchemeError(
            Fault(where, "a quantisation scheme", repr(text), f"Did you mean: {nearest(plain, KNOWN)}?")
        )
    size = DEFAULT_GROUP_SIZE if weight == "4" else None
    if grouping is not None:
        size = None if grouping == "channel" else int(grouping[1:])
    return Scheme(
        weight_bits=int(weight),
        group_size=size,
        symmetric=last != "asym",
        activation_bits=8 if eight else None,
        static=last == "static",
    )


def scheme_of(grid: Grid) -> Scheme:
    """The form of ``grid``."""
    return Scheme(
        weight_bits=grid.bits,
        number=grid.number,
        group_size=grid.group_size,
        symmetric=grid.zero_point_OG is None,
        activation_bits=grid.activation_bits,
        static=grid.activation_scale is not None,
    )
