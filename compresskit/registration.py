"""Bitmask checkpoints made known to transformers when that is imported. Costs nothing before; no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLES = "transformers.quantizers.auto"
"""The module of transformers that has the tables of quantizers."""
OURS = "compresskit.hf_quantizer"


class _Watch(MetaPathFinder):
    """Finds :data:`TABLES` as Python itself does, and has ours imported right after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            del loader.exec_module  # the class's own again
            import_module(OURS)

        loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register ours with transformers: now where its tables are there, else when they are imported."""
    if TABLES in sys.modules:
        import_module(OURS)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
