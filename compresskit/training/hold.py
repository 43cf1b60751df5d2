"""Pruned weights stay zero: their gradients are masked from the zeros themselves, so no mask is stored.

A weight whose gradient has been zero since the optimiser's state was zero is not moved by any optimiser of
``compresskit.training.rules``, and decoupled weight decay scales zero to zero. A mask multiplied in after the
step would be lost under DeepSpeed, which keeps its own copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from compresskit.errors import Fault, ModelError, PromiseError
from compresskit.registry import nearest
from compresskit.training.access import ParamAccess


@contextmanager
def hold_zeros(model: nn.Module, layers: Iterable[str], access: ParamAccess) -> Iterator[None]:
    """While this lasts, the zeros in the weights of ``layers`` get no gradient.

    Args:
        model: the bare model, after the engine has prepared it.
        layers: module names; each has a parameter ``weight``.
        access: of the engine.
    """
    undo: list[Callable[[], None]] = []
    try:
        for layer in layers:
            undo.append(access.mask_gradient(weight_of(model, layer)))
        yield
    finally:
        for remove in undo:
            remove()


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight of ``layer``; ModelError where there is none."""
    module = dict(model.named_modules()).get(layer)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        names = [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
        cure = f"Did you mean: {nearest(layer, names)}?"
        raise ModelError(Fault("held zeros", "the name of a layer with a weight", repr(layer), cure))
    return weight


def require_held(
    now: Callable[[str], Tensor], layers: Iterable[str], before: Callable[[str], Tensor]
) -> None:
    """Raise PromiseError unless every zero of ``before`` is still zero in ``now``.

    Args:
        now: the weight called ``<layer>.weight`` as it was saved.
        layers: whose zeros were held.
        before: the weight of that name before training.
    """
    faults = []
    for layer in layers:
        name = f"{layer}.weight"
        lost = int(((before(name) == 0) & (now(name) != 0)).sum())
        if lost:
            faults.append(
                Fault(
                    layer,
                    "every pruned weight still zero",
                    f"{lost} that training changed",
                    "This is a fault of the trainer, not of the recipe: please report it.",
                )
            )
    if faults:
        raise PromiseError(*faults)
