"""Sums over everything that belongs to a unit.

Shapes: L = blocks, U = units, D = hidden size, N = entries of an axis, I = inputs of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.modeling.anatomy import Anatomy
from compresskit.sparse.structured.dimensions import HIDDEN, Dimensions


class Tally:
    """One running sum for each unit of each width, in float64.

    Args:
        anatomy: of the model.
        dimensions: its widths; None where none is cut.
    """

    def __init__(self, anatomy: Anatomy, dimensions: Dimensions | None) -> None:
        self._anatomy, self._dimensions = anatomy, dimensions
        self._blocks = {block: index for index, block in enumerate(anatomy.blocks)}
        self.units: dict[str, Tensor] = {}
        for kind, width in dimensions.widths.items() if dimensions else ():
            shape = (width.units,) if kind == HIDDEN else (len(self._blocks), width.units)
            self.units[kind] = torch.zeros(shape, dtype=torch.float64)

    def add_parameter(self, name: str, worth: Tensor) -> None:
        """Add ``worth``, of the shape of parameter ``name``, to the units that its entries belong to."""
        if self._dimensions is None:
            return
        for axis in self._dimensions.axes_of(name, self._anatomy):
            rest = [a for a in range(worth.dim()) if a != axis.axis]
            worth_N = worth.sum(rest, dtype=torch.float64) if rest else worth.double()
            self._add(axis.kind, name, axis.owner_N, worth_N)

    def add_inputs(self, kind: str, layer: str, worth_I: Tensor) -> None:
        """Add ``worth_I`` (I,) to the units of ``kind`` that ``layer`` reads."""
        if self._dimensions is None:
            return
        linear = self._anatomy.linears[layer]
        along = 0 if linear.transposed else 1
        for axis in self._dimensions.axes_of(f"{layer}.weight", self._anatomy):
            if (axis.kind, axis.axis) == (kind, along):
                self._add(kind, layer, axis.owner_N, worth_I)

    def _add(self, kind: str, name: str, owner_N: Tensor, worth_N: Tensor) -> None:
        sums = self.units[kind]
        if kind != HIDDEN:
            block = self._anatomy.block_of(name)
            assert block is not None
            sums = sums[self._blocks[block]]
        sums.index_add_(0, owner_N, worth_N.detach().to("cpu", torch.float64))
