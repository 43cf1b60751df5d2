"""Training on the grid under one process, DDP, FSDP2, ZeRO-2 and ZeRO-3: the same losses, the same grids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_engine_qat
import pytest
import torch
from every_engine import NAMES
from every_engine_qat import ALL_FIELDS, ENGINES, RUNS, STEPS, train
from ranks import two_ranks
from tiny import tiny_llama

from compresskit.modeling import ModelSource
from compresskit.quant.promise import OnGrid
from compresskit.training.watch import LossLog
from compresskit.training.write import write_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 1e-3
"""Relative, of a loss: where sums of another order tip a weight over to the next step of its grid."""
CASES = [(run, engine) for run in RUNS for engine in ENGINES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, half of whose projections' weights are zero."""
    out = tmp_path_factory.mktemp("qat")
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
    pytest.importorskip("deepspeed")
    with two_ranks(every_engine_qat, place):
        for run in RUNS:
            fields = replace(ALL_FIELDS, micro_batch_size=8)
            train(run, ModelSource(place / "model"), place / f"{run}-one", place / f"{run}-one-s", fields)
    return place


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_agree_step_by_step(run: str, engine: str, launched: Path) -> None:
    """Inputs observed while they are rounded are rounded alike only where batches are cut alike."""
    other = "ddp" if run == "fixed" else "one"
    mine, true = (losses(launched / f"{run}-{name}-s") for name in (engine, other))
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=TOLERANCE)
    assert true[-1] < 0.95 * true[0], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_engine_that_ran_is_the_one_asked_for(run: str, engine: str, launched: Path) -> None:
    found: dict[str, Any] = json.loads((launched / f"{run}-{engine}.json").read_text())
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_saved_weights_lie_on_their_grids_and_keep_their_zeros(run: str, engine: str, launched: Path) -> None:
    before, made = ModelSource(launched / "model"), ModelSource(launched / f"{run}-{engine}")
    one = ModelSource(launched / f"{run}-one")
    for layer in (name for name in before.anatomy.linears if name != "lm_head"):
        scheme = RUNS[run][0 if "attn" in layer else 1]
        assert OnGrid(layer=layer, scheme=scheme).broken(made, made) == ()
        was, now = before.weight_OI(layer), made.weight_OI(layer)
        assert not now[was == 0].any()
        grid, same = made.grid(layer), one.grid(layer)
        assert grid is not None
        assert same is not None
        torch.testing.assert_close(grid.scale_OG, same.scale_OG, rtol=2e-2, atol=1e-4)
        assert (grid.activation_scale is not None) == (scheme == "w8a8-static")
        if grid.activation_scale is not None:
            torch.testing.assert_close(grid.activation_scale, same.activation_scale, rtol=2e-2, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_scales_did_learn(engine: str, launched: Path) -> None:
    """Under every engine their gradients arrive, and the ranks agree on them."""
    source = ModelSource(launched / "model")
    start = every_engine_qat.adaptation(source, "learned", 0).load(source).state_dict()
    made = ModelSource(launched / f"learned-{engine}")
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        grid = made.grid(layer)
        assert grid is not None
        assert (grid.scale_OG != start[f"{layer}.start_scale_OG"]).float().mean() > 0.9
