"""Let modules compute something else for a while, or look at what they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ABSENT = object()


@contextmanager
def computing(replaced: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within, each module computes its function when it is called, its hooks untouched.

    A forward that an instance had for itself is put back; of a module named twice the last function counts.
    """
    before: dict[nn.Module, object] = {}
    try:
        for module, forward in replaced:
            before.setdefault(module, module.__dict__.get("forward", ABSENT))
            module.forward = forward  # an attribute of the instance hides the class's method
        yield
    finally:
        for module, former in before.items():
            if former is ABSENT:
                del module.forward
            else:
                module.forward = former  # type: ignore[assignment]


@contextmanager
def keeping(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within, the output of each module is in the mapping once it was called: the tensor itself, no copy.

    Of several outputs it is the first. What a backward pass computes once more after this ended is not kept.
    """
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        kept[module] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in dict.fromkeys(modules)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
