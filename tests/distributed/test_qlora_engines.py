"""QLoRA under one process, DDP, FSDP2, ZeRO-2 and ZeRO-3: the same losses, the same zeros, sharded bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_engine_qlora
import pytest
import torch
from every_engine import NAMES
from every_engine_qlora import ALL_FIELDS, BROKEN, ENGINES, RUNS, STEPS, train
from ranks import two_ranks
from tiny import tiny_llama

from compresskit.modeling import ModelSource
from compresskit.training.adapters.bits import rounded
from compresskit.training.watch import LossLog
from compresskit.training.write import write_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = {"bf16": 5e-3}
"""Relative, of a loss; 5e-4 where none is given. Other engines round other intermediate results to bf16."""
CASES = [(run, engine) for run in RUNS for engine in ENGINES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, half of whose projections' weights are zero."""
    out = tmp_path_factory.mktemp("qlora")
    dense = ModelSource(tiny_llama(out / "dense", vocab_size=48, hidden_size=16, intermediate_size=32))
    tensors = {name: dense.tensor(name) for name in dense.names()}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    (out / "model").mkdir()
    write_checkpoint(dense, out / "model", tensors)
    return out


@pytest.fixture(scope="module")
def launched(place: Path) -> Path:
    """Two ranks, two rows at a time; beside them, one process with the whole batch at once."""
    for package in ("deepspeed", "bitsandbytes", "peft"):
        pytest.importorskip(package)
    with two_ranks(every_engine_qlora, place):
        for run in RUNS:
            fields = replace(ALL_FIELDS, micro_batch_size=8)
            train(run, ModelSource(place / "model"), place / f"{run}-one", fields)
    return place


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_agree_step_by_step(run: str, engine: str, launched: Path) -> None:
    mine, true = (LossLog(launched / f"{run}-{name}-s" / "losses.jsonl").losses() for name in (engine, "one"))
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=TOLERANCE.get(run, 5e-4))


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_engine_that_ran_splits_the_frozen_weights(run: str, engine: str, launched: Path) -> None:
    found: dict[str, Any] = json.loads((launched / f"{run}-{engine}.json").read_text())
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)
    linears = ModelSource(launched / "model").anatomy.linears
    half = sum(n.out_features * n.in_features for name, n in linears.items() if name != "lm_head") // 2
    assert found["frozen_bytes"] == half // (2 if engine in ("fsdp", "zero3") else 1)


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_merged_weights_keep_their_zeros(run: str, engine: str, launched: Path) -> None:
    before, made, one = (ModelSource(launched / name) for name in ("model", f"{run}-{engine}", f"{run}-one"))
    for layer in (name for name in before.anatomy.linears if name != "lm_head"):
        was, now = before.weight_OI(layer), made.weight_OI(layer)
        assert "held" in RUNS[run] or not now[was == 0].any()
        close = {"rtol": 0, "atol": 5e-2 if run == "bf16" else 5e-3}
        torch.testing.assert_close(now, one.weight_OI(layer), **close)
        if run == "lora":
            assert (now - rounded(was, "nf4")).abs().max() > 10 * close["atol"], "nothing moved"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_restart_changes_no_byte(engine: str, launched: Path) -> None:
    """Frozen bits are made anew or come back as they were, whatever an engine has in its checkpoint."""
    names = [f"{BROKEN}{kind}-{engine}" for kind in ("", "-broken")]
    assert json.loads((launched / f"{names[1]}.json").read_text())["resumed_from"] == 3
    one, two = (launched / name / "model.safetensors" for name in names)
    assert one.read_bytes() == two.read_bytes()
