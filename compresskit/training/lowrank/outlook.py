"""What can be told of a low-rank update before it is trained: its faults, and how many parameters it has.

Shapes: O = out_features, I = in_features, R = rank. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compresskit.calibration.oneshot import fit_faults, tied_faults
from compresskit.errors import Fault

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy, Linear

INSTALL = "Install it with `pip install 'compresskit[qlora]'`."


def size_faults(rank: int, alpha: float, where: str) -> list[Fault]:
    """What is wrong with the numbers themselves, whatever the model."""
    faults = []
    if rank < 1:
        faults.append(Fault(f"{where}.rank", "at least 1", str(rank), "Raise rank."))
    if not alpha > 0:
        faults.append(Fault(f"{where}.alpha", "a number above 0", str(alpha), "Raise alpha."))
    return faults


def rank_faults(rank: int, anatomy: Anatomy, layers: Sequence[str], where: str) -> list[Fault]:
    """One fault for all layers of one width whose weight has a smaller rank already."""

    def misfit(linear: Linear) -> str:
        least = min(linear.in_features, linear.out_features)
        return "" if rank <= least else f"in_features and out_features of at least the rank, {rank}"

    cure = "Lower rank, or add these layers to ignore."
    return fit_faults(anatomy.linears, layers, misfit, where=f"{where}.rank", cure=cure)


def layer_faults(anatomy: Anatomy, layers: Sequence[str], where: str) -> list[Fault]:
    """Layers that cannot be frozen and updated beside that."""
    linears, field = anatomy.linears, f"{where}.targets"
    faults = tied_faults(anatomy, layers, where)
    if not faults and anatomy.head in layers:
        # The loss is computed from the head's own weight, a block of tokens at a time: no adapter is seen.
        cure = f"Add {anatomy.head} to ignore."
        faults.append(Fault(field, "layers before the output projection", str(anatomy.head), cure))
    # Frozen, a layer is a plain one, whatever it was.
    if odd := [name for name in layers if not linears[name].is_plain and not linears[name].transposed]:
        expected = "layers that compute as torch.nn.Linear does"
        faults.append(Fault(field, expected, ", ".join(odd), "Add these layers to ignore."))
    return faults


def factor_parameters(rank: int, anatomy: Anatomy, layers: Iterable[str]) -> int:
    """Of the factors (R, I) and (O, R) of every layer's update."""
    linears = (anatomy.linears[name] for name in layers)
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)
