"""Which layers a stage touches: include and exclude patterns over the linear layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from compresskit.errors import Fault, InputError
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy

EVERY_LINEAR = "Linear"
DEFAULT_IGNORE = ("lm_head",)


def matches(pattern: str, layer: str) -> bool:
    """Whether ``pattern`` names ``layer``.

    Args:
        pattern: ``Linear`` (every layer), a name, a shell pattern such as ``*.down_proj``, the tail of a
            name such as ``mlp.up_proj``, or ``re:`` and a regular expression matched from the start.
        layer: qualified module name.

    Returns:
        True when it does.
    """
    if pattern == EVERY_LINEAR:
        return True
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return fnmatchcase(layer, pattern) or layer.endswith("." + pattern)


def select(
    anatomy: Anatomy,
    targets: Iterable[str] = (EVERY_LINEAR,),
    ignore: Iterable[str] = DEFAULT_IGNORE,
    *,
    where: str = "targets",
) -> tuple[str, ...]:
    """The linear layers that ``targets`` name and ``ignore`` does not, in the model's order.

    Args:
        anatomy: of the model.
        targets: patterns as in :func:`matches`; a layer is in when any matches.
        ignore: the same; a layer is out when any matches. ``lm_head`` means the output head whatever
            its name in this model, and may match nothing.
        where: the place to name in an error.

    Returns:
        Qualified module names, at least one.

    Raises:
        InputError: a pattern is no regular expression or matches no layer, or no layer is left.
    """
    layers = list(anatomy.linears)
    faults = [
        fault
        for field, patterns in (("targets", targets), ("ignore", ignore))
        for pattern in patterns
        if (fault := _fault(pattern, layers, f"{where}.{field}"))
    ]
    if faults:
        raise InputError(*faults)
    chosen = tuple(
        layer
        for layer in layers
        if any(matches(p, layer) for p in targets)
        and not any(matches(p, layer) or (p == "lm_head" and layer == anatomy.head) for p in ignore)
    )
    if not chosen:
        raise InputError(
            Fault(
                where=where,
                expected="at least one linear layer to work on",
                got=f"none of {len(layers)}: ignore takes out all that targets let in",
                cure="Widen targets or narrow ignore.",
            )
        )
    return chosen


def _fault(pattern: str, layers: list[str], where: str) -> Fault | None:
    try:
        found = any(matches(pattern, layer) for layer in layers)
    except re.error as error:
        return Fault(where, "a regular expression after 're:'", f"{pattern!r} ({error})", "Mend the pattern.")
    if found or pattern in DEFAULT_IGNORE:
        return None
    tails = {layer.rpartition(".")[2] for layer in layers}
    return Fault(
        where,
        "a pattern that matches some linear layer",
        f"{pattern!r}, which matches none of {len(layers)}",
        f"Layers here end in: {nearest(pattern.rpartition('.')[2], tails)}.",
    )
