"""Layers that multiply otherwise for a while, by another class: what they hold stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compresskit.errors import EngineError, Fault

if TYPE_CHECKING:
    from torch import Tensor, nn


def block_linears(model: nn.Module, field: str, cure: str, *, multiple: int = 1) -> list[Any]:
    """The plain ``torch.nn.Linear`` layers in the blocks of ``model``.

    Args:
        model: a language model of transformers.
        field: that asks for other products.
        cure: where there is no such layer.
        multiple: of which both widths of a layer have to be.

    Raises:
        EngineError: there is none, so that all of the model would multiply as before.
    """
    from torch import nn

    from compresskit.modeling.anatomy import anatomy_of

    linears = anatomy_of(model).linears.values()
    names = [
        n.name for n in linears if n.block and not (n.in_features % multiple or n.out_features % multiple)
    ]
    layers: list[Any] = [m for m in map(model.get_submodule, names) if type(m) is nn.Linear]
    if not layers:
        expected = "torch.nn.Linear layers in the model's blocks"
        if multiple > 1:
            expected += f", of widths that are multiples of {multiple}"
        raise EngineError(Fault(field, expected, "none", cure))
    return layers


@contextmanager
def swapped(layers: Sequence[Any], kind: type[nn.Module], own: Mapping[str, Any]) -> Iterator[None]:
    """While this lasts, ``layers`` are of class ``kind``; afterwards plain ``torch.nn.Linear`` again.

    Args:
        layers: plain ``torch.nn.Linear``.
        kind: a subclass.
        own: attributes that a layer of it has beside those of its base.
    """
    from torch import nn

    for layer in layers:
        layer.__class__ = kind
        vars(layer).update(own)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            for name in own:
                delattr(layer, name)


def to_autocast(input: Tensor) -> Tensor:
    """``input`` as autocast would have it, for products that autocast does not know."""
    import torch

    kind = input.device.type
    return input.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else input
