"""Bars of third parties while a packed model is loaded and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from compresskit.data.spec import DataSpec
from compresskit.formats.checkpoint import export_checkpoint
from compresskit.measure.load import load_model as load_as_users_do
from compresskit.modeling import load_model, open_model
from compresskit.modeling.quiet import without_bars
from compresskit.quant.stage import Quantize
from compresskit.stage import StageContext
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    source = open_model(tiny_llama(place / "model"))
    for name in ("dense", "packed"):
        (place / name).mkdir()
    context = StageContext(
        out=place / "dense",
        scratch=place,
        original=source.directory,
        data=DataSpec(source="no-such-data"),
        cache=place,
    )
    Quantize(scheme="w4a16-channel").run(source, context)
    export_checkpoint(open_model(place / "dense"), place / "packed")
    return place / "packed"


@pytest.mark.parametrize("load", [load_model, load_as_users_do])
def test_loading_and_running_draw_nothing(
    load: Callable[[Path], Any], packed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    model = load(packed)
    with torch.no_grad():
        first, second = (model(torch.arange(8).view(1, -1)).logits for _ in range(2))
    assert torch.equal(first, second)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_bars_are_back_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    with without_bars():
        assert list(tqdm(range(3), desc="hidden", disable=False)) == [0, 1, 2]
    assert list(tqdm(range(3), desc="shown", disable=False)) == [0, 1, 2]
    err = capfd.readouterr().err
    assert "hidden" not in err
    assert "shown" in err
