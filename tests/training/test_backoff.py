"""Memory that runs out: fewer rows a pass, the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compresskit.errors import RunError
from compresskit.training.backoff import is_short, pieces
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
FIELDS = TrainingFields(
    steps=6, batch_size=12, micro_batch_size=6, learning_rate=3e-3, checkpoint_every=0, adapt_batch="memory"
)


@contextmanager
def scarce(model: LlamaForCausalLM, *, rows: int, after: int = 0, backward: bool = False) -> Iterator[None]:
    """Memory for so many rows a pass once ``after`` passes are done, forward or backward."""
    seen = []

    def short(tensor: torch.Tensor) -> None:
        seen.append(len(tensor))
        if len(seen) > after and len(tensor) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if backward and output.requires_grad:
            output.register_hook(short)
        elif not backward and module.training:
            short(output)

    handle = model.model.layers[1].mlp.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def train(model: Any, rows: Any, scratch: Path, **changes: Any) -> TrainOutcome:
    return Run(
        model, rows, fields=replace(FIELDS, **changes), scratch=scratch, validation=rows, device="cpu"
    ).train()


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("after", [0, 5])
def test_steps_are_the_same(backward: bool, after: int, make_model: Make, rows: Any, tmp_path: Path) -> None:
    """Rows have different numbers of supervised tokens: none may be lost, and none be counted twice."""
    plain, model = make_model(), make_model()
    true = train(plain, rows, tmp_path / "plain", adapt_batch="none")
    with scarce(model, rows=2, after=after, backward=backward):
        outcome = train(model, rows, tmp_path / "scarce")
    assert losses(tmp_path / "scarce") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert outcome.validation_loss == pytest.approx(true.validation_loss, rel=1e-5)
    for (name, mine), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5, msg=name)
    assert (true.micro_batch_size, outcome.micro_batch_size) == (6, 1)
    step = 1 + after // 2
    assert [
        f"in step {step} with {n} rows a pass" in w for n, w in zip((6, 3), outcome.warnings, strict=True)
    ]


def test_where_there_is_enough_nothing_changes(make_model: Make, rows: Any, tmp_path: Path) -> None:
    outcomes = [train(make_model(), rows, tmp_path / n, adapt_batch=n) for n in ("none", "memory")]
    assert losses(tmp_path / "none") == losses(tmp_path / "memory")
    assert outcomes[1].warnings == ()
    assert outcomes[1].micro_batch_size == 6


def test_one_row_that_does_not_fit_ends_the_run(make_model: Make, rows: Any, tmp_path: Path) -> None:
    model = make_model()
    with scarce(model, rows=0), pytest.raises(RunError, match=r"a pass of one row.*Shorten context_length"):
        train(model, rows, tmp_path)


def test_other_errors_are_not_taken_for_it(make_model: Make, rows: Any, tmp_path: Path) -> None:
    model = make_model()

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    model.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(model, rows, tmp_path)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_what_means_that_memory_ran_out(error: RuntimeError, short: bool) -> None:
    assert is_short(error) is short


def test_pieces_leave_no_row_out() -> None:
    batch = {"input_ids": torch.arange(14).reshape(7, 2), "labels": torch.arange(7), "signal": object()}
    parts = pieces(batch, 3)
    assert [len(part["labels"]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert all(part.keys() == {"input_ids", "labels"} for part in parts)
    assert pieces(batch, 7) == [batch]
