"""Silence for the progress bars of libraries that offer no switch of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tqdm.std import tqdm  # type: ignore[import-untyped]


@contextmanager
def without_bars() -> Iterator[None]:
    """No tqdm bar is drawn within, whatever its maker asks for.

    compressed-tensors draws one for each step of loading, and neither its arguments nor transformers' reach
    them from ``from_pretrained``.
    """
    original = tqdm.__init__

    def quiet(self: Any, *args: Any, **settings: Any) -> None:
        original(self, *args, **{**settings, "disable": True})

    with patch.object(tqdm, "__init__", quiet):
        yield


def hush(model: Any) -> None:
    """Let a packed ``model``, which compressed-tensors unpacks in its first forward, do so without a bar."""
    handle = getattr(model, "ct_decompress_hook", None)
    if handle is None:
        return
    hooks = model._forward_pre_hooks
    unpack = hooks[handle.id]

    def quietly(*args: Any) -> Any:
        with without_bars():
            return unpack(*args)

    hooks[handle.id] = quietly
