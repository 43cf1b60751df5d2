"""What a walk is said to need in memory, against what one holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from compresskit.calibration.oneshot import calibration_bytes, largest_layer, spilled_bytes, walk_bytes
from compresskit.calibration.walk import walk
from compresskit.modeling import StreamedModel, open_model
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_or_one_table(family: str, model: Model, tmp_path: Path) -> None:
    source = open_model(model(family))
    held = []
    with StreamedModel(source, tmp_path) as streamed:
        buffers = sum(buffer.nbytes for buffer in streamed.module.buffers())
        new = 4 * largest_layer(source.anatomy, list(source.anatomy.linears))
        for table in streamed.tables:
            with streamed.table(table):
                held.append(streamed.resident_bytes - buffers)
        for index in range(len(streamed.blocks)):
            with streamed.block(index):
                held.append(streamed.resident_bytes - buffers + new)
    assert walk_bytes(source.anatomy, 4) == max(held)


@dataclass
class Asked:
    samples: int
    context_length: int | None
    data: None = None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_between_runs(
    family: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(model(family))
    stage, spill = Asked(samples=3, context_length=8), tmp_path / "scratch" / "hidden"
    sizes = []

    def visit(layer: str, weight_OI: Tensor, stats: object) -> Tensor:
        sizes.append(sum(file.stat().st_size for file in spill.parent.iterdir()))
        return weight_OI

    (tmp_path / "out").mkdir()
    with StreamedModel(source, tmp_path / "out") as streamed:
        walk(streamed, [{"input_ids": tokens(8, n)} for n in range(3)], visit, spill=spill)
    assert spilled_bytes(stage, source.config, source.anatomy) == 0, "it fits into memory"
    in_memory = calibration_bytes(stage, source.config, source.anatomy)
    monkeypatch.setattr("compresskit.calibration.oneshot.SPILL_BYTES", 1000)
    forecast = spilled_bytes(stage, source.config, source.anatomy)
    assert max(sizes) <= forecast
    if family == "llama":
        assert forecast <= 1.5 * max(sizes)
    assert calibration_bytes(stage, source.config, source.anatomy) == in_memory - forecast + 1000
