"""What quantisation promises: each weight lies on its grid to the bit. O = out_features, I = in_features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compresskit.formats.grid import Grid, same_grid
from compresskit.quant.scheme import parse, scheme_of

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.stage import Weights

MAX_SENTENCES = 10


@dataclass(frozen=True, slots=True)
class OnGrid:
    """``layer`` keeps the grid it was given, and every weight of it lies on that grid.

    Attributes:
        layer: qualified module name.
        scheme: the grid's form, as :func:`compresskit.quant.scheme.parse` reads it.
    """

    kind: ClassVar[str] = "grid"

    layer: str
    scheme: str

    def broken(self, made: Weights, now: Weights) -> tuple[str, ...]:
        """Compare the grids, their form with the scheme, then the weights with the grid, group by group.

        Args:
            made: the checkpoint of the stage that quantised.
            now: the checkpoint to check.

        Returns:
            Sentences such as ``row 3, group 1: 2 of 32 weights off the grid``; empty when kept.
        """
        if f"{self.layer}.weight" not in now:
            return (f"{self.layer} is gone",)
        grid = now.grid(self.layer)
        if grid is None:
            return ("the grid is gone",)
        if not same_grid(made.grid(self.layer), grid):
            return ("the grid is not the one that was made",)
        if scheme_of(grid) != parse(self.scheme):
            return (f"the grid is one of {scheme_of(grid)}, not of {self.scheme}",)
        weight_OI = now.weight_OI(self.layer)
        return _off_grid(weight_OI, grid)


def _off_grid(weight_OI: Tensor, grid: Grid) -> tuple[str, ...]:
    rows, inputs = weight_OI.shape
    size = grid.group_size or inputs
    if weight_OI.dtype != grid.scale_OG.dtype:
        return (f"the weight is {weight_OI.dtype}, its scales {grid.scale_OG.dtype}",)
    if grid.scale_OG.shape != (rows, inputs // size):
        return (f"the shape is ({rows}, {inputs}), its scales' {tuple(grid.scale_OG.shape)}",)
    count_OG = (grid.snap(weight_OI) != weight_OI).reshape(rows, -1, size).sum(-1)
    bad = count_OG.nonzero().tolist()
    shown = bad if len(bad) <= MAX_SENTENCES else bad[: MAX_SENTENCES - 1]
    said = [f"row {o}, group {g}: {int(count_OG[o, g])} of {size} weights off the grid" for o, g in shown]
    return (*said, f"and {len(bad) - len(shown)} more") if len(shown) < len(bad) else tuple(said)
