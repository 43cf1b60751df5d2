"""Bytes of the tensors that are alive, counted as operations make them; fake tensors as well as real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts while it is entered; what was there before is not counted.

    What an operation makes and drops inside of itself is not seen.

    Args:
        known: tensors that are there already.

    Attributes:
        bytes: alive now.
        peak_bytes: the most since :meth:`mark`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak_bytes = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._seen[id(tensor.untyped_storage())] = tensor.untyped_storage()

    def mark(self) -> None:
        """The peak is looked for from here on."""
        self.peak_bytes = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _forget(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self.bytes -= size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


def gradient_bytes(model: nn.Module) -> int:
    """Of the gradients that the parameters of ``model`` have now."""
    found = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            storage = parameter.grad.untyped_storage()
            found[id(storage)] = storage.nbytes()
    return sum(found.values())
