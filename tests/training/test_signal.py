"""What the trainer adds to a teacher's signal: how far the training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

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
