"""The grid a quantised weight lies on, and the file that carries grids between stages.

Shapes: O = out_features, I = in_features, G = groups along I (1 when a row has one scale).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compresskit.errors import Fault, FormatError
from compresskit.formats.files import save_tensors

GRIDS_FILE = "grids.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values a weight may take: ``q * scale``, rounded once into the scale's dtype.

    That is to the bit what compressed-tensors computes when it unpacks a checkpoint. Zero is on every grid.
    There are no zero points: transformers cannot load a packed checkpoint that has them.

    Attributes:
        bits: of q, a signed integer: -2**(bits-1) ... 2**(bits-1)-1.
        scale_OG: positive, in the weight's own dtype.
        group_size: inputs that share a scale; None: all of a row.
        activation_bits: of the layer's input, rounded per token while the model runs; None leaves it alone.
    """

    bits: int
    scale_OG: Tensor
    group_size: int | None = None
    activation_bits: int | None = None

    def quantize(self, weight_OI: Tensor) -> Tensor:
        """The integers nearest to a weight.

        Args:
            weight_OI: (O, I), any float dtype.

        Returns:
            int8 (O, I). For a weight that lies on this grid :meth:`dequantize` gives it back to the bit.
        """
        scale_OI = self._scale_OI(weight_OI)
        wide = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
        q_OI = (weight_OI.to(wide) / scale_OI.to(wide)).round_()
        half = 2 ** (self.bits - 1)
        return q_OI.clamp_(-half, half - 1).to(torch.int8)

    def dequantize(self, q_OI: Tensor) -> Tensor:
        """The weight (O, I), in the scale's dtype, that the integers ``q_OI`` (int8) stand for."""
        scale_OI = self._scale_OI(q_OI)
        return q_OI.to(scale_OI.dtype) * scale_OI

    def snap(self, weight_OI: Tensor) -> Tensor:
        """The nearest weight on the grid, (O, I) in the scale's dtype; zeros stay exactly zero."""
        return self.dequantize(self.quantize(weight_OI))

    def bits_per_weight(self, in_features: int) -> float:
        """Bits one stored weight takes, its share of the scales included."""
        return self.bits + 8 * self.scale_OG.element_size() / (self.group_size or in_features)

    def _scale_OI(self, like_OI: Tensor) -> Tensor:
        rows, inputs = like_OI.shape
        groups = 1 if self.group_size is None else inputs // self.group_size
        if self.scale_OG.shape != (rows, groups) or inputs % groups:
            raise FormatError(
                Fault(
                    "grid",
                    f"scales of shape ({rows}, {groups}) for a weight ({rows}, {inputs}), {self._grouping()}",
                    str(tuple(self.scale_OG.shape)),
                    "Quantise the layer again: its shape has changed since.",
                )
            )
        return self.scale_OG.to(like_OI.device).repeat_interleave(inputs // groups, dim=1)

    def _grouping(self) -> str:
        return "one scale per row" if self.group_size is None else f"groups of {self.group_size}"


def same_grid(a: Grid | None, b: Grid | None) -> bool:
    """Whether two grids hold the same values, to the bit."""
    if a is None or b is None:
        return a is b
    plain = all(getattr(a, f) == getattr(b, f) for f in ("bits", "group_size", "activation_bits"))
    return plain and a.scale_OG.dtype == b.scale_OG.dtype and torch.equal(a.scale_OG, b.scale_OG)


def write_grids(directory: Path, grids: Mapping[str, Grid]) -> None:
    """Write ``grids`` (layer name -> grid) into ``directory``; the bytes depend on nothing else."""
    tensors, plain = {}, {}
    for layer in sorted(grids):
        grid = grids[layer]
        tensors[f"{layer}.scale"] = grid.scale_OG.contiguous().cpu()
        plain[layer] = {f: getattr(grid, f) for f in ("bits", "group_size", "activation_bits")}
    save_tensors(directory / GRIDS_FILE, tensors, {"grids": json.dumps(plain, sort_keys=True)})


def read_grids(directory: Path) -> dict[str, Grid]:
    """Read what :func:`write_grids` wrote.

    Args:
        directory: a checkpoint.

    Returns:
        Layer name -> grid; empty where nothing is quantised.

    Raises:
        FormatError: the file is damaged.
    """
    path = directory / GRIDS_FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["grids"])
            return {
                layer: Grid(scale_OG=file.get_tensor(f"{layer}.scale"), **fields)
                for layer, fields in plain.items()
            }
    except Exception as error:  # safetensors raises its own untyped errors for a truncated file
        raise FormatError(
            Fault(
                str(path), "the grids of a quantised model", f"{type(error).__name__}: {error}", "Run again."
            )
        ) from error
