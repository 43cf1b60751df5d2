"""Values in memory and in a file: what is read is what was written last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compresskit.calibration.activations import Activations


@pytest.mark.parametrize("in_a_file", [False, True])
def test_values_may_change_their_size(in_a_file: bool, tmp_path: Path) -> None:
    file = tmp_path / "values" if in_a_file else None
    values = Activations(file)
    sizes = {0: (2, 3), 1: (4, 3)}
    for again in range(3):
        wanted = {batch: torch.rand(*size) + again for batch, size in sizes.items()}
        for batch, value in wanted.items():
            values[batch] = value
        for batch, value in wanted.items():
            assert torch.equal(values[batch], value)
            values[batch].zero_()
            assert torch.equal(values[batch], value), "what is read is a copy"
        sizes = {0: (8, 3), 1: (1, 3)} if again == 0 else {0: (1, 2), 1: (4, 3)}
    values.clear()
    with pytest.raises(KeyError):
        values[0]
    values.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_no_longer_the_writers() -> None:
    values, value = Activations(), torch.ones(3)
    values[0] = value
    value.zero_()
    assert torch.equal(values[0], torch.ones(3))
