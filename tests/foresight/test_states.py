"""Bytes of states, against tensors that are really made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Adafactor

from compresskit.foresight.states import (
    Engine,
    Held,
    engine_of,
    gradient_bytes,
    master_bytes,
    optimizer_bytes,
    weight_bytes,
)
from compresskit.training.fields import TrainingFields
from compresskit.training.setting import Setting

SHAPES = ((7, 6), (5, 7), (5,), ())
HELD = Held(SHAPES)


def stepped(make: type[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors that an optimiser keeps of parameters of these shapes, but for counters."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = make(parameters)  # type: ignore[call-arg]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for n, t in s.items() if n not in ("step", "RMS")]
    return sum(t.numel() * 4 for t in states if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
        ("sgd", torch.optim.SGD),
        ("adafactor", Adafactor),
    ],
)
def test_optimisers_keep_what_is_foretold(name: str, make: type[torch.optim.Optimizer]) -> None:
    assert optimizer_bytes(HELD, Engine("single"), name) == stepped(make)


def test_fsdp_keeps_rows() -> None:
    """The fullest of three ranks has what torch's chunks give the first."""
    chunks = [torch.zeros(shape or (1,)).chunk(3)[0] for shape in SHAPES]
    assert weight_bytes(HELD, Engine("fsdp", 3)) == 4 * sum(c.numel() for c in chunks)


def test_zero_divides_what_its_stage_says() -> None:
    total = 4 * (42 + 35 + 5 + 1)
    one, two, three = (Engine(f"zero{stage}", 2) for stage in (1, 2, 3))
    assert weight_bytes(HELD, Engine("ddp")) == weight_bytes(HELD, one) == weight_bytes(HELD, two) == total
    assert weight_bytes(HELD, three) == 4 * (21 + 18 + 3 + 1)
    assert master_bytes(HELD, Engine("fsdp", 2)) == 0
    assert master_bytes(HELD, two) == pytest.approx(total / 2, abs=4)
    assert gradient_bytes(HELD, two) == pytest.approx(total / 2, abs=4)
    assert gradient_bytes(HELD, Engine("ddp")) == total
    assert optimizer_bytes(HELD, two, "adamw_torch") == pytest.approx(total, abs=8)


def test_frozen_weights_have_no_states() -> None:
    held = Held(((2, 3),), frozen=((10, 10),))
    engine = Engine("single")
    assert weight_bytes(held, engine) == 4 * 106
    assert gradient_bytes(held, engine) == 4 * 6
    assert optimizer_bytes(held, engine, "adamw_torch") == 8 * 6


def test_a_configuration_of_the_users_own_sets_the_bucket(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 1e6, "stage3_max_live_parameters": "auto"}})
    )
    fields = TrainingFields(strategy="deepspeed", zero_stage=3, deepspeed_config=str(path))
    engine = engine_of(Setting(fields, 4, "cpu"))
    assert (engine.kind, engine.shards, engine.bucket, engine.live) == ("zero3", 4, 10**6, 10**9)
    assert engine_of(Setting(TrainingFields(strategy="ddp"), 4, "cpu")) == Engine("ddp")


@pytest.mark.parametrize(
    ("said", "doubled"), [({}, True), ({"overlap_comm": "auto"}, True), ({"overlap_comm": False}, False)]
)
def test_zero_2_has_a_second_bucket_to_fill_while_one_is_reduced(
    said: dict[str, Any], doubled: bool, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": said | {"reduce_bucket_size": 100}}))
    fields = TrainingFields(strategy="deepspeed", zero_stage=2, deepspeed_config=str(path))
    assert engine_of(Setting(fields, 2, "cpu")).bucket == (200 if doubled else 100)
    without = replace(fields, overlap=False)
    assert engine_of(Setting(without, 2, "cpu")).bucket == 100
    assert engine_of(Setting(replace(fields, zero_stage=3), 2, "cpu")).bucket == 100
