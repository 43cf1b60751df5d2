"""A tensor whose numbers are made when they are first asked for.

Models ask ``layer.weight`` for its type or its place in every call, and for nothing else; that must not cost
what making a packed weight dense costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_PROPERTIES = ("dtype", "device", "shape", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "grad")
_KINDS = ("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_leaf")
TOLD = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in (*_PROPERTIES, *_KINDS)),
        *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
        *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    }
)
"""What is answered without numbers."""


class Unread(Tensor):
    """Everywhere a tensor of ``make()``, which is called at most once, when more than :data:`TOLD` is asked.

    Operations on it are those on what was made, and give plain tensors.

    Args:
        make: the tensor itself, of this shape and type, in this place.
        shape, dtype, device: its.
    """

    _is_hf_initialized = True
    """transformers draws no first numbers into what says so."""
    _make: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Unread:
        """See the class."""
        made: Unread = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._make, made._made = make, None
        return made

    def read(self) -> Tensor:
        """The tensor, which lives as long as this does: someone may have asked for its address."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for whatever Python asks of it."""
        if func in TOLD:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for what reaches torch's operators another way."""
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs or {}))
        return func(*args, **kwargs)
