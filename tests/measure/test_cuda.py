"""The same measurements on an accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compresskit.measure import measure


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_measurements_on_cuda(llama_dir: Path) -> None:
    got = {r.kind: r for r in measure(llama_dir, data=["abc"], device="cuda", repetitions=3)}
    host = {r.kind: r for r in measure(llama_dir, data=["abc"], what=("quality",), device="cpu")}
    assert got["memory"].values["cuda_peak_bytes"] > got["size"].values["num_parameters"] * 4
    assert got["latency"].device == got["memory"].device == torch.cuda.get_device_name()
    expected = host["quality"].values["nats_per_token"]
    assert got["quality"].values["nats_per_token"] == pytest.approx(expected, abs=1e-3)
