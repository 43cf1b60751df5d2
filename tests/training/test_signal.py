"""What the trainer adds to a teacher's signal: how far the training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import files_of_at_most
from torch import Tensor
from transformers import LlamaForCausalLM

from compresskit.errors import Fault, RunError
from compresskit.training.fields import TrainingFields
from compresskit.training.objective import CrossEntropy, Head, Hidden, Signal
from compresskit.training.order import Rows
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

Make = Callable[..., LlamaForCausalLM]
STEPS = 8
FIELDS = TrainingFields(
    steps=STEPS, batch_size=4, micro_batch_size=2, learning_rate=3e-3, checkpoint_every=2, eval_every=3
)


class Interrupted(Exception):
    pass


class Recording:
    """Cross entropy that writes down the progress it is told, in training and in evaluations apart."""

    needs_teacher = True

    def __init__(self, passes: int = 100) -> None:
        self.passes = passes
        self.training: list[float] = []
        self.evaluating: list[float] = []

    def __repr__(self) -> str:
        return "Recording()"  # that of a restart is of the same run

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        assert signal is not None
        if len(self.training) == self.passes:
            raise Interrupted
        (self.training if torch.is_grad_enabled() else self.evaluating).append(signal.progress)
        return CrossEntropy()(hidden_BTD, head, labels_BT, None)


class Silent:
    """A teacher that says the same of every text, and leaves the progress alone."""

    hidden = None

    def load(self) -> None:
        pass

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        states = torch.zeros(*inputs["input_ids"].shape, 4)
        return Signal(Hidden(states, Head(torch.zeros(48, 4))))


class Lost(Silent):
    """One elsewhere, that is lost after so many answers."""

    is_remote = True

    def __init__(self, answers: int) -> None:
        self.answers = answers

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        if not self.answers:
            raise RunError(Fault("teacher there", "an answer", "none", "Start it again."))
        self.answers -= 1
        return super().signal(inputs)


def train(make_model: Make, rows: Rows, scratch: Path, objective: Any) -> TrainOutcome:
    return Run(
        make_model(),
        rows,
        fields=FIELDS,
        scratch=scratch,
        objective=objective,
        teacher=Silent(),
        validation=rows,
        evaluates_first=True,
        device="cpu",
    ).train()


def test_progress_is_the_share_of_steps_done_and_whole_in_evaluations(
    make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    """Both passes of a step are told the same: before the first nothing is done."""
    objective = Recording()
    train(make_model, rows, tmp_path, objective)
    assert objective.training == [step / STEPS for step in range(STEPS) for _ in range(2)]
    evaluations = 4  # before the first step, after the third and the sixth, and at the end
    assert objective.evaluating == [1.0] * (evaluations * 12)


def test_a_restart_goes_on_where_the_progress_was(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(make_model, rows, tmp_path, Recording(passes=11))
    objective = Recording()
    assert train(make_model, rows, tmp_path, objective).resumed_from == 4
    assert objective.training == [step / STEPS for step in range(4, STEPS) for _ in range(2)]
    assert set(objective.evaluating) == {1.0}


def test_a_full_disk_does_not_hide_that_the_teacher_was_lost(
    make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    run = Run(
        make_model(),
        rows,
        fields=replace(FIELDS, checkpoint_every=0, eval_every=0),
        scratch=tmp_path,
        objective=Recording(),
        teacher=Lost(answers=2),
        device="cpu",
    )
    with (
        files_of_at_most(10_000),
        pytest.raises(RunError, match=r"teacher there: expected an answer(.|\n)*No checkpoint of it"),
    ):
        run.train()
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))
