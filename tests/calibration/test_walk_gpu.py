"""The walk on a GPU against the walk on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compresskit.calibration.statistics import STATISTICS, LayerStats
from compresskit.calibration.walk import walk
from compresskit.modeling import StreamedModel, open_model
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_statistics_and_weights(family: str, model: Model, tmp_path: Path) -> None:
    rows = [{"input_ids": tokens(n, n)} for n in (20, 7)]
    stats: dict[str, dict[str, LayerStats]] = {"cpu": {}, "cuda": {}}
    for device, seen in stats.items():

        def visit(layer: str, weight_OI: torch.Tensor, found: LayerStats, seen=seen, device=device):  # type: ignore[no-untyped-def]
            assert (
                weight_OI.device.type == found.require("input_gram", weight_OI.shape[1]).device.type == device
            )
            seen[layer] = found
            return weight_OI * (1 - 0.1 * found.require("input_sq_mean", weight_OI.shape[1]).tanh())

        (tmp_path / device).mkdir()
        with StreamedModel(open_model(model(family)), tmp_path / device, device=device) as streamed:
            walk(streamed, rows, visit, frozenset(STATISTICS))
    one, other = open_model(tmp_path / "cpu"), open_model(tmp_path / "cuda")
    for name in one.names():
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-3, atol=1e-4, msg=name)
    for layer, found in stats["cpu"].items():
        gram = stats["cuda"][layer].require("input_gram", len(found.input_gram_II)).cpu()  # type: ignore[arg-type]
        torch.testing.assert_close(gram, found.input_gram_II, rtol=2e-3, atol=1e-3, msg=layer)
