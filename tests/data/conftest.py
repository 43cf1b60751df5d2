"""A hub that is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import datasets
import pytest

FakeHub = Callable[[dict[str, datasets.Dataset]], None]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Makes ``owner/set:small`` a data set with the given splits."""

    def install(tables: dict[str, datasets.Dataset]) -> None:
        def builder(path: str, configuration: str | None) -> SimpleNamespace:
            assert (path, configuration) == ("owner/set", "small")
            return SimpleNamespace(
                dataset_name="set",
                hash="abc",
                config=SimpleNamespace(name=configuration),
                info=SimpleNamespace(version="1.0.0", features=tables["train"].features),
                download_and_prepare=lambda: None,
                as_dataset=lambda: datasets.DatasetDict(tables),
            )

        monkeypatch.setattr(datasets, "load_dataset_builder", builder)

    return install
