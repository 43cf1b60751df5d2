"""Erdos-Renyi densities: of two layers with as many weights, the one with the longer sides stays denser.

Paper: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
https://arxiv.org/abs/1911.11134, section 3; for linear layers the kernel's part of the formula is empty.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping


def erk_zero_fractions(shapes: Mapping[str, tuple[int, int]], zero_fraction: float) -> dict[str, float]:
    """The share of each layer that is to be zero, so that all layers together have ``zero_fraction``.

    The density of a layer is proportional to (O + I) / (O * I), and at most 1: what a layer that stays dense
    cannot give, the others make up for.

    Args:
        shapes: layer -> (O, I).
        zero_fraction: of all weights, in (0, 1).

    Returns:
        Layer -> zeros of it, in [0, 1).
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    kept = (1 - zero_fraction) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        sparse = shapes.keys() - dense
        scale = (kept - sum(sizes[n] for n in dense)) / max(sum(sum(shapes[n]) for n in sparse), 1)
        density = {n: 1.0 if n in dense else scale * sum(shapes[n]) / sizes[n] for n in shapes}
        full = {n for n in sparse if density[n] >= 1}
        if not full:
            return {name: 1 - density[name] for name in shapes}
        dense |= full
