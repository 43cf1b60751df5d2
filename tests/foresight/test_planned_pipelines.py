"""Pipelines foretold: who holds which blocks, what is on its way at once, and how long ranks wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _ComputationType
from transformers import LlamaConfig

import compresskit as ck
from compresskit.foresight.candidates import Row, combinations, weighed
from compresskit.foresight.devices import machine
from compresskit.foresight.pipeline import operations, ranks_of
from compresskit.foresight.subject import Subject

TOKENS, WIDTH, BLOCKS, VOCABULARY = 128, 128, 8, 64


MACHINE = machine(gpus=4, gpu="l4")


@pytest.fixture
def subject_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    """A stage that trains a small model; nothing is foretold of it yet."""
    monkeypatch.setattr("compresskit.foresight.forecast.candidates", lambda *_: [])

    def made(schedule: str, *, tied: bool = False) -> Subject:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=352,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            architectures=["LlamaForCausalLM"],
        )
        path = tmp_path / "config.json"
        path.write_text(config.to_json_string())
        stage = ck.Finetune(batch_size=16, context_length=TOKENS, pipeline_schedule=schedule)
        (one,) = ck.foresee(ck.Recipe(model=str(path), stages=(stage,)), MACHINE).forecasts
        return one.subject

    return made


def piped(subject: Subject) -> Row:
    """Pipelines of four with micro-batches of a row."""
    (way,) = [
        c
        for c in combinations(subject, MACHINE)
        if (c.strategy, c.checkpointing, c.rows) == ("pipeline 4", "none", 1)
    ]
    row = weighed(subject, MACHINE, way)
    assert not row.refused
    return row


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_operations_are_those_of_torch(schedule: str, width: int, count: int) -> None:
    """torch's own plans of what each rank does; they know nothing of ours."""
    facts: Any = SimpleNamespace(
        _num_stages=width,
        _n_microbatches=count,
        pp_group_size=width,
        n_local_stages=2,
        microbatches_per_round=count // max(1, count // width),
    )
    for at in range(width):
        if schedule == "interleaved":
            planned = ScheduleInterleaved1F1B._calculate_single_rank_operations(facts, at)
        else:
            kind: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]
            planned = kind._get_pipeline_order(facts)[at]
        forward, back = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
        done = [a for a in planned if a is not None and a.computation_type in (forward, back)]
        expected = [(a.computation_type == forward, a.stage_index // width) for a in done]
        assert operations(schedule, width, at, count) == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_ranks_have_all_weights_among_them(
    schedule: str, tied: bool, subject_of: Callable[..., Subject]
) -> None:
    subject = subject_of(schedule, tied=tied)
    ranks = ranks_of(subject, replace(subject.stage, processes=4, pipeline_stages=4))
    assert [len(rank.parts) for rank in ranks] == [2 if schedule == "interleaved" else 1] * 4
    assert sum(part.blocks for rank in ranks for part in rank.parts) == BLOCKS
    held = sum(prod(shape) for rank in ranks for shape in rank.held.trained)
    twice = VOCABULARY * WIDTH if tied else 0  # the first and the last rank have it
    assert held == subject.model.anatomy.num_parameters + twice
    assert [bool(rank.shared) for rank in ranks] == [tied, False, False, tied]


def test_gpipe_holds_all_micro_batches_and_1f1b_as_many_as_ranks(subject_of: Callable[..., Subject]) -> None:
    many, few = (piped(subject_of(name)).peak for name in ("gpipe", "1f1b"))
    assert many is not None
    assert few is not None
    # 16 micro-batches of a row, or 4 in the first rank, each of which keeps what one block keeps, twice.
    assert many.terms["activations"] == pytest.approx(4 * few.terms["activations"], rel=0.15)


def test_ranks_wait_less_where_stages_are_interleaved(subject_of: Callable[..., Subject]) -> None:
    plain, interleaved = (piped(subject_of(name)).pace for name in ("1f1b", "interleaved"))
    assert plain is not None
    assert interleaved is not None
    # A step takes m + p - 1 slots of a stage of two blocks, or twice m and p - 1 more of stages of one.
    assert plain.compute_s / interleaved.compute_s == pytest.approx((16 + 3) / (16 + 3 / 2), rel=0.02)
    assert interleaved.communication_s > plain.communication_s
