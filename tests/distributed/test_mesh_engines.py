"""Copies of shards, split layers, and shards of split layers: the losses and the zeros of one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import every_engine_mesh
import pytest
import torch
from every_engine import FIELDS, make_model
from every_engine_mesh import (
    BROKEN,
    MESHES,
    NAMES,
    PARTS,
    RANKS,
    RUNS,
    SPLIT,
    STEPS,
    make_qwen,
    student,
    train,
)
from ranks import several_ranks
from safetensors.torch import load_file
from split_kinds import KINDS
from torch import Tensor

from compresskit.sparse.pattern import parse_pattern
from compresskit.training.outcome import TrainOutcome
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 5e-6
"""Relative, of a loss at any of 10 steps: ranks sum in other orders, in fp32."""
CASES = [(run, mesh) for run in RUNS for mesh in RANKS]
AGAIN = [(run, mesh) for run in BROKEN for mesh in RANKS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mesh")
    make_qwen(layers=4, seed=1).save_pretrained(out / "teacher")
    return out


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, tuple[TrainOutcome, Mapping[str, Tensor]]]:
    """One process, the whole batch at once."""
    found = {}
    for run in RUNS:
        saved: dict[str, Tensor] = {}
        found[run] = train(place, run, place / f"{run}-one-s", saved, micro_batch_size=8), saved
    return found


@pytest.fixture(scope="module")
def launched(place: Path, request: pytest.FixtureRequest) -> Path:
    """Two ranks, then four; beside the first, one process."""
    for ranks in MESHES:
        with several_ranks(every_engine_mesh, place, ranks):
            request.getfixturevalue("single")
    return place


def losses(place: Path, name: str) -> list[float]:
    return LossLog(place / f"{name}-s" / "losses.jsonl").losses()


def outcome_of(place: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize(("run", "mesh"), CASES)
def test_losses_agree_step_by_step(run: str, mesh: str, launched: Path, single: Any) -> None:
    mine, true = losses(launched, f"{run}-{mesh}"), losses(launched, f"{run}-one")
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=TOLERANCE)
    assert min(true) < 0.97 * true[0], "nothing was learnt, so nothing was compared"
    said, (outcome, _) = outcome_of(launched, f"{run}-{mesh}"), single[run]
    assert said["validation_loss"] == pytest.approx(outcome.validation_loss, rel=TOLERANCE)
    assert said["final_parts"] == pytest.approx(dict(outcome.final_parts), rel=TOLERANCE)
    assert said["given_step"] == outcome.given_step


@pytest.mark.parametrize(("run", "mesh"), CASES)
def test_norms_of_gradients_agree(run: str, mesh: str, launched: Path) -> None:
    """Of all ranks together; in most runs they are above what gradients are scaled down to."""
    logs = [launched / f"{run}-{name}-s" / "losses.jsonl" for name in (mesh, "one")]
    mine, true = (
        [json.loads(line)["grad_norm"] for line in log.read_text().splitlines() if "grad_norm" in line]
        for log in logs
    )
    assert mine == pytest.approx(true, rel=1e-4)
    assert run == "few" or max(true) > FIELDS.max_grad_norm


@pytest.mark.parametrize("mesh", RANKS)
def test_the_engine_that_ran_is_the_one_asked_for(mesh: str, launched: Path) -> None:
    for run in RUNS:
        found = outcome_of(launched, f"{run}-{mesh}")
        assert (found["engine"], found["processes"]) == (NAMES[mesh], RANKS[mesh])


@pytest.mark.parametrize(("run", "mesh"), CASES)
def test_a_rank_keeps_its_part_of_the_bytes(run: str, mesh: str, launched: Path) -> None:
    """Norms are whole under tensor parallelism, and a vocabulary that is odd is in parts of two sizes."""
    whole = sum(p.nbytes for p in student(run)[0].parameters())
    kept = outcome_of(launched, f"{run}-{mesh}")["parameter_bytes"] * PARTS[mesh]
    assert whole <= kept <= 1.05 * whole


@pytest.mark.parametrize(("run", "mesh"), CASES)
def test_what_is_saved_is_what_one_process_saves(run: str, mesh: str, launched: Path, single: Any) -> None:
    saved, (_, true) = load_file(launched / f"{run}-{mesh}.safetensors"), single[run]
    assert saved.keys() == true.keys()
    for name, tensor in true.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("run", "mesh"), [(r, m) for r, m in CASES if r in ("best", "rigl")])
def test_zeros_are_those_asked_for(run: str, mesh: str, launched: Path, single: Any) -> None:
    saved, (before, held) = load_file(launched / f"{run}-{mesh}.safetensors"), make_model()
    for layer in held:
        now, was = saved[f"{layer}.weight"] == 0, before.get_submodule(layer).weight == 0
        if run == "rigl":
            assert parse_pattern("70%:layer").missing(now) == (), layer
            assert torch.equal(now, single[run][1][f"{layer}.weight"] == 0), layer
        else:
            assert torch.equal(now, was), layer


@pytest.mark.parametrize(("run", "mesh"), AGAIN)
def test_a_restart_changes_no_byte(run: str, mesh: str, launched: Path) -> None:
    assert outcome_of(launched, f"{run}-broken-{mesh}")["resumed_from"] == 6
    assert losses(launched, f"{run}-broken-{mesh}") == losses(launched, f"{run}-{mesh}")
    one, two = (launched / f"{name}-{mesh}.safetensors" for name in (run, f"{run}-broken"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("mesh", RANKS)
def test_a_checkpoint_has_each_part_once(mesh: str, launched: Path) -> None:
    checkpoints = sorted((launched / f"rigl-broken-{mesh}-s" / "checkpoints").glob("checkpoint-*"))
    assert len(checkpoints) == 2, "the last and the one before"
    name = "model.layers.0.mlp.down_proj.weight"
    whole = make_model()[0].get_parameter(name).numel()
    for checkpoint in checkpoints:
        parts = [torch.load(path, weights_only=True)["model"] for path in checkpoint.glob("part-*.pt")]
        assert len(parts) == PARTS[mesh]
        assert sum(part[name].numel() for part in parts) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds_compute_the_same_when_they_are_split(kind: str, launched: Path) -> None:
    for rank in range(SPLIT):
        found = json.loads((launched / f"kinds-{rank}.json").read_text())[kind]
        assert found["loss"] < 1e-5
        assert found["gradient"] < 1e-4
        assert 0.4 < found["share"] < 0.55
