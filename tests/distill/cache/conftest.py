"""A teacher with opinions, and rows for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from taught import Some
from tiny import tiny_llama


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("taught") / "teacher", initializer_range=0.2)


@pytest.fixture
def rows() -> Some:
    return Some()
