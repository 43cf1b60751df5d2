"""Tiny models of every family, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.modeling.families import make

Model = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """``model(family, dtype)``: a directory that tests read but never write."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make(family, tmp_path_factory.mktemp(family), dtype=dtype)
        return made[family, dtype]

    return get
