"""Pipelines and HSDP with what other tests run without them: one process's losses, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import every_engine_pairs
import pytest
import torch
from every_engine_pairs import NAMES, RUNS, WAYS, train
from ranks import several_ranks
from tiny import tiny_llama

from compresskit.modeling import ModelSource
from compresskit.training.watch import LossLog
from compresskit.training.write import write_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = {"qat": 1e-3, "int8": 1e-3, "qlora": 5e-4}
"""Relative, of a loss at any step; 2e-5 in fp32. Sums of another order tip numbers of few bits over."""
CASES = [(way, engine) for engine, ways in RUNS.items() for way in ways]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both launches, of two ranks and of four; beside them, one process with the whole batch at once."""
    for package in ("bitsandbytes", "torchao", "peft"):
        pytest.importorskip(package)
    place = tmp_path_factory.mktemp("pairs")
    dense = ModelSource(tiny_llama(place / "dense", vocab_size=48, hidden_size=16, intermediate_size=32))
    tensors = {name: dense.tensor(name) for name in dense.names()}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    (place / "model").mkdir()
    write_checkpoint(dense, place / "model", tensors)
    with several_ranks(every_engine_pairs, place, 2):
        for way in WAYS:
            train(way, place, f"{way}-one", micro_batch_size=8)
    with several_ranks(every_engine_pairs, place, 4):
        pass
    return place


@pytest.mark.parametrize(("way", "engine"), CASES)
def test_losses_are_one_processs(way: str, engine: str, launched: Path) -> None:
    outcome = json.loads((launched / f"{way}-{engine}.json").read_text())
    assert (outcome["engine"], outcome["processes"]) == (NAMES[engine], 2 if engine == "pipeline" else 4)
    mine, true = (LossLog(launched / f"{way}-{name}-s" / "losses.jsonl").losses() for name in (engine, "one"))
    assert len(mine) == len(true) >= 6
    assert mine == pytest.approx(true, rel=TOLERANCE.get(way, 2e-5))
    assert true[-1] < 0.99 * true[0], "nothing was learnt, so nothing was compared"
