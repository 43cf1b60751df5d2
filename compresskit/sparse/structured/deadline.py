"""A shape whose request takes no longer than a given time, with as many parameters as that allows."""

from __future__ import annotations

from collections.abc import Callable

from compresskit.errors import Fault, PatternError
from compresskit.sparse.structured.shapes import Shape

RUNGS = 128
"""Shares of the parameters that are looked at: one rung is less than a hundredth of them."""
SMALLEST = 1e-9
"""A share that no shape has: the nearest is the smallest one."""


def largest_within(
    milliseconds: float, shape_of: Callable[[float], Shape], ms_of: Callable[[Shape], float], whole_ms: float
) -> Shape:
    """The shape that keeps most parameters within ``milliseconds``.

    Fewer parameters take less time, but for small steps up where a width suits the processor less well. The
    search halves the shares between one that is in time and one that is not, so that few shapes are timed;
    what it gives is in time whatever the steps.

    Args:
        milliseconds: of a request, at most.
        shape_of: the shape nearest to a share of the parameters.
        ms_of: a shape's time; asked for once.
        whole_ms: of the model as it is.

    Raises:
        PatternError: the smallest shape takes longer, or the whole model does not.
    """
    where = "milliseconds"
    taken: dict[tuple[object, ...], float] = {}

    def ms(shape: Shape) -> float:
        key = (shape.blocks, *sorted(shape.units.items()))
        taken[key] = taken[key] if key in taken else ms_of(shape)
        return taken[key]

    if whole_ms <= milliseconds:
        expected = f"less than the {whole_ms:.4g} that the model takes as it is"
        raise PatternError(Fault(where, expected, f"{milliseconds:g}", "Lower it, or leave the cut out."))
    found = shape_of(SMALLEST)
    if (fastest := ms(found)) > milliseconds:
        expected = f"at least {fastest:.4g}, what the smallest legal shape takes"
        cure = f"Raise it, lower multiple, or trim both; the model takes {whole_ms:.4g} as it is."
        raise PatternError(Fault(where, expected, f"{milliseconds:g}", cure))
    low, high = 0, RUNGS
    while high - low > 1:
        middle = (low + high) // 2
        shape = shape_of(middle / RUNGS)
        if ms(shape) <= milliseconds:
            low, found = middle, shape
        else:
            high = middle
    return found
