"""On-policy distillation under DDP, FSDP2 and ZeRO-3 on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_policy
import pytest
import torch
from every_engine import NAMES, Counting
from every_engine_policy import ENGINES, POLICY, STEPS, TOKEN
from ranks import two_ranks
from torch import Tensor

from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PASSES = 2
"""Of a step: 8 rows, 2 ranks, 2 rows at a time."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    place = tmp_path_factory.mktemp("policy")
    with two_ranks(every_engine_policy, place):
        pass
    return place


def asked(place: Path, name: str) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = torch.load(place / f"{name}.pt")
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_each_rank_learns_from_text_of_its_own(engine: str, launched: Path) -> None:
    rows = {tuple(ids.tolist()) for ids in Counting().ids}
    said: list[Any] = []
    for rank in range(2):
        batches = asked(launched, f"{engine}-{rank}")
        assert len(batches) == STEPS * PASSES
        for index, batch in enumerate(batches):
            own = [tuple(ids.tolist()) not in rows for ids in batch["input_ids"]]
            assert own == [POLICY.is_due(index // PASSES, 0)] * len(own)
            if own[0]:
                said.append(batch["labels"][batch["labels"] != -100].tolist())
    assert len({str(one) for one in said}) == len(said) == STEPS * PASSES, "half of the steps, of two ranks"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_generated_is_what_the_student_says(engine: str, launched: Path) -> None:
    found = 0
    for rank in range(2):
        for index, batch in enumerate(asked(launched, f"{engine}-{rank}-one")):
            if POLICY.is_due(index // PASSES, 0):
                learnt = batch["labels"][batch["labels"] != -100]
                assert learnt.tolist() == [TOKEN] * POLICY.max_new_tokens * len(batch["labels"])
                found += 1
    assert found == STEPS * PASSES


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_ran_and_a_restart_changes_no_byte(engine: str, launched: Path) -> None:
    told = json.loads((launched / f"{engine}.json").read_text())
    assert (told["outcome"]["engine"], told["outcome"]["processes"]) == (NAMES[engine], 2)
    losses = LossLog(launched / f"{engine}-s" / "losses.jsonl").losses()
    assert len(losses) == STEPS
    assert all(0 < loss < 20 for loss in losses)
    assert told["resumed"]["resumed_from"] == 2
    again = LossLog(launched / f"{engine}-again-s" / "losses.jsonl").losses()
    assert again == losses
    one, other = (launched / f"{engine}{end}.safetensors" for end in ("", "-again"))
    assert one.read_bytes() == other.read_bytes()
