"""What a walk is said to need in memory, against what one holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.calibration.oneshot import largest_layer, walk_bytes
from compresskit.modeling import StreamedModel, open_model
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES


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
