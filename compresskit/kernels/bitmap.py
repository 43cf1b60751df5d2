"""A weight with zeros, said in the least words: which weights are kept, and their values in order.

It belongs to no device: a file holds this, and every packed layout is made of it and made back into it.

Shapes: O = outputs, I = inputs, B = bytes of a row's mask = ceil(I / 8), K = kept weights, G = groups of
inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import Fault

BYTE = 8
PIECE_WEIGHTS = 1 << 20
VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """A weight of ``(out_features, in_features)``; ``faults()`` says whether its parts agree.

    Attributes:
        mask_OB: uint8; bit ``i % 8`` (the lowest first) of byte ``i // 8`` says whether input i is kept. Bits
            past the last input are 0.
        values_K: of the kept weights, row by row; one of ``VALUE_TYPES``.
        in_features: I.
        scales_OG: fp32, what int8 values are multiplied by, each for ``I / G`` inputs; None for other values.
    """

    mask_OB: Tensor
    values_K: Tensor
    in_features: int
    scales_OG: Tensor | None = None

    @property
    def out_features(self) -> int:
        """O."""
        return self.mask_OB.shape[0]

    @property
    def zero_fraction(self) -> float:
        """Share of the weights that are not kept."""
        return 1 - self.values_K.numel() / max(1, self.out_features * self.in_features)

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        parts = (self.mask_OB, self.values_K, self.scales_OG)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def faults(self, where: str) -> list[Fault]:
        """Everything in which its parts contradict each other; ``where`` is the place to name."""
        cure = "Write the file again; it was damaged, or written by something else."
        faults = _form_faults(self, where, cure)
        if faults:
            return faults
        kept = int(kept_per_row(self.mask_OB).sum())
        if kept != self.values_K.numel():
            faults.append(
                Fault(where, f"a value for each of {kept} kept weights", f"{len(self.values_K)}", cure)
            )
        over = -self.in_features % BYTE
        if over and bool((self.mask_OB[:, -1] >> (BYTE - over)).any()):
            faults.append(Fault(where, f"no kept weight past input {self.in_features}", "some", cure))
        numbers = (("values", self.values_K), ("scales", self.scales_OG))
        for name, tensor in numbers:
            if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                faults.append(Fault(f"{where} {name}", "finite numbers", "NaN or infinity", cure))
        return faults


def pack(weight_OI: Tensor, scales_OG: Tensor | None = None) -> Bitmap:
    """Keep what is not zero of ``weight_OI`` (its own type; int8 with ``scales_OG``)."""
    return Bitmap(
        mask_OB=pack_bits(weight_OI != 0),
        values_K=weight_OI[weight_OI != 0],
        in_features=weight_OI.shape[1],
        scales_OG=scales_OG,
    )


def unpack(weight: Bitmap, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight, (O, I), zeros in their places; int8 values multiplied by their scales.

    Args:
        weight: without a fault.
        dtype: of the result; None takes the values' own, and fp32 for int8 ones.
    """
    shape = weight.out_features, weight.in_features
    dense_OI = torch.zeros(shape, dtype=weight.values_K.dtype, device=weight.mask_OB.device)
    row = 0
    for part in pieces(weight):
        rows = dense_OI[row : row + part.out_features]
        rows[unpack_bits(part.mask_OB, weight.in_features)] = part.values_K
        row += part.out_features
    if weight.scales_OG is not None:
        group = weight.in_features // weight.scales_OG.shape[1]
        dense_OI = dense_OI.to(weight.scales_OG.dtype) * weight.scales_OG.repeat_interleave(group, dim=1)
    return dense_OI if dtype is None else dense_OI.to(dtype)


def pieces(weight: Bitmap, weights: int = PIECE_WEIGHTS) -> Iterator[Bitmap]:
    """``weight`` by rows, of about so many weights a piece, so that what is made of one stays small."""
    rows = max(1, weights // max(1, weight.in_features))
    ends = kept_per_row(weight.mask_OB).cumsum(0)[rows - 1 :: rows].tolist()
    starts = (0, *ends)
    for index, row in enumerate(range(0, weight.out_features, rows)):
        end = ends[index] if index < len(ends) else None
        yield Bitmap(
            mask_OB=weight.mask_OB[row : row + rows],
            values_K=weight.values_K[starts[index] : end],
            in_features=weight.in_features,
            scales_OG=None if weight.scales_OG is None else weight.scales_OG[row : row + rows],
        )


def pack_bits(keep_OI: Tensor) -> Tensor:
    """Eight weights to a byte, the lowest bit first, (O, ceil(I / 8)) uint8, from bool (O, I)."""
    bits_OI = pad(keep_OI.to(torch.uint8), (0, -keep_OI.shape[1] % BYTE))
    places = torch.arange(BYTE, dtype=torch.uint8, device=keep_OI.device)
    bytes_OB8 = bits_OI.reshape(len(bits_OI), -1, BYTE) << places
    return bytes_OB8.sum(-1, dtype=torch.uint8)


def unpack_bits(mask_OB: Tensor, in_features: int) -> Tensor:
    """bool (O, I), what :func:`pack_bits` was given."""
    places = torch.arange(BYTE, dtype=torch.uint8, device=mask_OB.device)
    return ((mask_OB[..., None] >> places) & 1).flatten(1)[:, :in_features].bool()


def kept_per_row(mask_OB: Tensor) -> Tensor:
    """How many weights each row keeps, int64 (O,)."""
    counts = [bin(byte).count("1") for byte in range(256)]
    table = torch.tensor(counts, dtype=torch.uint8, device=mask_OB.device)
    return table[mask_OB.int()].sum(-1)


def _form_faults(weight: Bitmap, where: str, cure: str) -> list[Fault]:
    """Types and shapes."""
    mask, values, scales = weight.mask_OB, weight.values_K, weight.scales_OG
    faults = []
    width = -(-weight.in_features // BYTE)
    if mask.dtype != torch.uint8 or mask.dim() != 2 or mask.shape[1] != width:
        expected = f"uint8 of (outputs, {width})"
        faults.append(Fault(f"{where} mask", expected, f"{mask.dtype} of {tuple(mask.shape)}", cure))
    if values.dtype not in VALUE_TYPES or values.dim() != 1:
        expected = "one row of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in VALUE_TYPES)
        faults.append(Fault(f"{where} values", expected, f"{values.dtype} of {tuple(values.shape)}", cure))
    if (values.dtype == torch.int8) != (scales is not None):
        got = "none" if scales is None else f"scales beside {values.dtype} values"
        faults.append(Fault(f"{where} scales", "scales beside int8 values, and only there", got, cure))
    if scales is not None and mask.dim() == 2:
        groups = scales.shape[-1] if scales.dim() == 2 else 0
        if not groups or scales.shape[0] != len(mask) or weight.in_features % groups:
            expected = f"({len(mask)}, a divisor of {weight.in_features})"
            faults.append(Fault(f"{where} scales", expected, str(tuple(scales.shape)), cure))
    return faults
