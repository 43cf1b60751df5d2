"""What a run gives and tells besides its last weights: the best evaluation, and trackers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import files_of_at_most
from test_run import FIELDS, Make, losses, train
from torch import Tensor

from compresskit.errors import CheckpointError, DataError, NumericError
from compresskit.training import run as run_module
from compresskit.training.objective import CrossEntropy
from compresskit.training.order import Rows
from compresskit.training.run import Run
from compresskit.training.trackers import Trackers
from compresskit.training.watch import LossLog


def test_the_best_evaluation_is_kept_also_over_a_restart(
    make_model: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that climbs: the loss falls and then rises, so the best is neither end."""
    changes: dict[str, Any] = {
        "steps": 12,
        "learning_rate": 0.5,
        "lr_schedule": "constant",
        "warmup_fraction": 0.99,
        "eval_every": 2,
        "keep_best": True,
        "checkpoint_every": 4,
        "validation": rows,
    }
    saved: dict[str, Tensor] = {}
    outcome = train(make_model(), rows, tmp_path / "a", save=saved.update, **changes)
    evaluations = {
        r["step"]: r["validation_loss"]
        for r in LossLog(tmp_path / "a" / "losses.jsonl").read()
        if "validation_loss" in r
    }
    best = min(evaluations, key=evaluations.__getitem__)
    assert 0 < best < 12, evaluations
    assert (outcome.given_step, outcome.validation_loss) == (best, pytest.approx(evaluations[best]))
    model = make_model()
    model.load_state_dict(saved)
    whole = train(model, rows, tmp_path / "b", steps=1, learning_rate=1e-12, validation=rows)
    assert whole.validation_loss == pytest.approx(evaluations[best], rel=1e-5)

    broken = tmp_path / "c"
    with monkeypatch.context() as patch:
        step_of_log = run_module.Watch.step

        def stops(self: Any, step: int, *args: Any, **kwargs: Any) -> None:
            step_of_log(self, step, *args, **kwargs)
            if step == 9:
                raise KeyboardInterrupt

        patch.setattr(run_module.Watch, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), rows, broken, **changes)
    again: dict[str, Tensor] = {}
    resumed = train(make_model(), rows, broken, save=again.update, **changes)
    assert (resumed.resumed_from, resumed.given_step) == (8, best)
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_the_best_needs_rows_to_evaluate_on(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="keep_best: expected validation rows"):
        train(make_model(), rows, tmp_path, keep_best=True, eval_every=2)


def test_a_full_disk_is_told_and_the_best_before_stays(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"keep_best": True, "eval_every": 2, "steps": 4, "validation": rows}
    with files_of_at_most(10_000), pytest.raises(CheckpointError, match=r"best.safetensors: .*begins anew"):
        train(make_model(), rows, tmp_path, **changes)
    assert not list(tmp_path.glob("best.*"))


def test_the_best_of_another_run_is_never_given(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    """Of a run whose evaluations are not finite there is no best, whatever lies there from before."""

    class Lost(CrossEntropy):
        def __call__(self, *given: Any) -> Mapping[str, Tensor]:
            sums = super().__call__(*given)
            return sums if torch.is_grad_enabled() else {"loss": sums["loss"] * math.nan}

    changes: dict[str, Any] = {"keep_best": True, "eval_every": 2, "steps": 4, "validation": rows}
    train(make_model(), rows, tmp_path, **changes)
    assert (tmp_path / "best.safetensors").is_file()
    fields = replace(FIELDS, **{name: value for name, value in changes.items() if name != "validation"})
    with pytest.raises(NumericError, match="keep_best: expected a validation loss that is finite"):
        Run(
            make_model(),
            rows,
            fields=fields,
            scratch=tmp_path,
            device="cpu",
            validation=rows,
            objective=Lost(),
        ).train()


def test_a_service_is_told_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    seen: list[Any] = []

    class Service:
        requires_logging_directory = False

        def __init__(self, project: str, **settings: Any) -> None:
            seen.append((project, settings))

        def start(self) -> None: ...

        def store_init_configuration(self, values: Any) -> None:
            seen.append(values)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Service)
    Trackers(("wandb",), run="training-1234", settings={"steps": 8, "trackers": ("wandb",)})
    assert seen == [("compresskit", {"name": "training-1234"}), {"steps": 8}]


def test_a_tracker_is_told_every_step(
    make_model: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("COMPRESSKIT_RUNS", str(tmp_path / "runs"))
    train(make_model(), rows, tmp_path / "a", trackers=("tensorboard",), validation=rows, eval_every=4)
    (run,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(run))
    events.Reload()
    told = [event.value for event in events.Scalars("loss")]
    assert told == pytest.approx(losses(tmp_path / "a"), rel=1e-6)
    assert [event.step for event in events.Scalars("validation_loss")] == [4, 8]
    assert {"tokens_per_s", "memory_bytes", "learning_rate"} <= set(events.Tags()["scalars"])
