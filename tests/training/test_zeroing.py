"""Zeros made while a live model trains: held at once, by every optimiser, and forgotten by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compresskit.errors import ModelError, PlanError
from compresskit.sparse.train_run import Scheduled
from compresskit.training import access as access_module
from compresskit.training.access import Whole
from compresskit.training.fields import TrainingFields
from compresskit.training.order import Rows
from compresskit.training.run import Run

Make = Callable[..., LlamaForCausalLM]
FIELDS = TrainingFields(steps=8, batch_size=4, learning_rate=1e-2, checkpoint_every=0, weight_decay=0.1)
LAYER = "model.layers.0.mlp.up_proj"
SEEN: list[tuple[int, Tensor]] = []


@dataclass(frozen=True)
class Columns:
    """Zeroes another column after each of the first steps; tells what it was given."""

    layers: tuple[str, ...] = (LAYER,)
    columns: int = 6

    def due(self, step: int, steps: int) -> bool:
        return 0 < step <= self.columns

    def needs_gradient(self, step: int, steps: int) -> bool:
        return False

    def change(
        self, layer: str, weight_OI: Tensor, gradient_OI: Tensor | None, *, step: int, steps: int
    ) -> Tensor:
        assert gradient_OI is None
        SEEN.append((step, weight_OI.clone()))
        made_OI = weight_OI.clone()
        made_OI[:, step - 1] = 0
        return made_OI


def train(model: nn.Module, rows: Rows, scratch: Path, zeroing: Any, **changes: Any) -> None:
    SEEN.clear()
    Run(
        model, rows, fields=replace(FIELDS, **changes), scratch=scratch, device="cpu", zeroing=zeroing
    ).train()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_a_zero_that_was_made_is_held_by_every_optimizer(
    make_model: Make, rows: Rows, tmp_path: Path, optimizer: str
) -> None:
    model = make_model()
    train(model, rows, tmp_path, Columns(), optimizer=optimizer)
    assert [step for step, _ in SEEN] == [1, 2, 3, 4, 5, 6]
    for step, weight_OI in SEEN:
        assert not weight_OI[:, : step - 1].any(), f"revived before step {step}"
        assert weight_OI[:, step - 1 :].all()
    now_OI = model.get_submodule(LAYER).weight
    assert not now_OI[:, :6].any()
    assert now_OI[:, 6:].all()
    assert not torch.equal(SEEN[-1][1][:, 6:], now_OI[:, 6:]), "nothing was trained after"


@pytest.mark.parametrize("steps_before", [0, 3])
def test_the_optimiser_forgets_what_turned(steps_before: int) -> None:
    weight = nn.Parameter(torch.arange(1.0, 9.0).reshape(2, 4))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(steps_before):
        weight.grad = torch.ones(2, 4)
        optimizer.step()
    with torch.no_grad():
        weight[0, 0] = 0
    before = weight.detach().clone()
    kept = {n: t.clone() for n, t in optimizer.state.get(weight, {}).items()}

    def turn(whole_OI: Tensor, _: Tensor | None = None) -> Tensor:
        made_OI = whole_OI.clone()
        made_OI[0, 0], made_OI[1, 3] = 1e-6, 0.0
        return made_OI

    Whole().change(weight, optimizer, turn)
    assert torch.equal(weight, turn(before))
    state = optimizer.state.get(weight, {})
    assert bool(state) == bool(steps_before)
    for name in kept.keys() - {"step"}:
        expected = kept[name]
        expected[0, 0], expected[1, 3] = 0, 0
        assert torch.equal(state[name], expected), name
    if kept:
        assert state["step"] == kept["step"] == steps_before


def test_what_is_wrong_is_told(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"up_proj"):
        train(make_model(), rows, tmp_path, Columns(layers=("model.layers.0.mlp.upp_proj",)))
    with pytest.raises(PlanError, match="keeps pruned weights at zero"):
        train(make_model(), rows, tmp_path, Columns(), optimizer="adamw_8bit")


def test_without_a_change_that_is_due_nothing_differs(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    plain, idle = make_model(), make_model()
    train(plain, rows, tmp_path / "plain", None)
    train(idle, rows, tmp_path / "idle", Columns(columns=0))
    for (name, mine), true in zip(idle.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, true), name


def test_a_gradient_is_zero_where_the_loss_did_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is summed all the same: another rank's loss may have needed the layer."""
    sums: list[Tensor] = []
    monkeypatch.setattr(access_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(access_module.dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(access_module.dist, "all_reduce", sums.append)
    weight, access, given = nn.Parameter(torch.ones(2, 4)), Whole(), []

    def keep(whole_OI: Tensor, gradient_OI: Tensor | None) -> Tensor:
        given.append(gradient_OI)
        return whole_OI

    access.change(weight, torch.optim.SGD([weight]), keep)
    assert given == [None]
    assert sums == []
    access.collecting = True
    access.change(weight, torch.optim.SGD([weight]), keep)
    assert len(sums) == 1
    assert torch.equal(given[1], torch.zeros(2, 4))


def rigl(*layers: str) -> Scheduled:
    options = {"update_every": 2, "end": 0.75}
    return Scheduled(method="rigl", options=options, ends=dict.fromkeys(layers, "50%:layer"))


def zeros_by_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Fills with where each layer is zero after each change."""
    found: dict[str, list[Tensor]] = {}
    change = Scheduled.change

    def noted(self: Scheduled, layer: str, *rest: Any, **moment: Any) -> Tensor:
        made = change(self, layer, *rest, **moment)
        found.setdefault(layer, []).append(made == 0)
        return made

    monkeypatch.setattr(Scheduled, "change", noted)
    return found


def test_a_layer_that_took_no_part_in_the_step_keeps_its_zeros(
    make_model: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros, model = zeros_by_step(monkeypatch), make_model()
    model.spare = nn.Linear(8, 8)
    train(model, rows, tmp_path, rigl(LAYER, "spare"))
    assert len(zeros["spare"]) == len(zeros[LAYER]) == 4  # after steps 0, 2, 4 and 6
    assert not torch.equal(zeros[LAYER][0], zeros[LAYER][1])
    assert all(torch.equal(now, zeros["spare"][0]) for now in zeros["spare"])
    assert torch.equal(model.spare.weight == 0, zeros["spare"][0])


def test_a_step_that_overflowed_moves_no_zeros(
    make_model: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each does here; the change before the first step looks at no gradient."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**60, backoff_factor=0.99)
    )
    zeros, model = zeros_by_step(monkeypatch), make_model()
    train(model, rows, tmp_path, rigl(LAYER), precision="fp16")
    assert len(zeros[LAYER]) == 1
    assert torch.equal(model.get_submodule(LAYER).weight == 0, zeros[LAYER][0])
