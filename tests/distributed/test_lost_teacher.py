"""A server that one of two ranks loses: both stop, all steps that were done are kept, none is changed."""

from __future__ import annotations

import json
from pathlib import Path

import every_engine_lost
import pytest
from every_engine import NAMES
from every_engine_lost import ANSWERS, ENGINES, LOSING, STEPS, VOCABULARY
from ranks import two_ranks
from tiny import tiny_llama

from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROWS = 4
"""That one rank asks for in a step."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    place = tmp_path_factory.mktemp("lost")
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    tiny_llama(place / "teacher", seed=1, initializer_range=0.2, **ids)
    tiny_llama(place / "student", attention_dropout=0.2, **ids)
    with two_ranks(every_engine_lost, place):
        pass
    return place


@pytest.mark.parametrize("engine", ENGINES)
def test_both_ranks_stop_and_a_restart_changes_no_byte(engine: str, launched: Path) -> None:
    told = [json.loads((launched / f"{engine}-{rank}.json").read_text()) for rank in range(2)]
    step = ANSWERS // ROWS
    assert told[0]["url"] != told[1]["url"]
    for said in told:
        assert f"teacher at {told[LOSING]['url']}" in said["error"], "the rank that lost it tells why"
        assert "(2 attempts in" in said["error"]
        assert f"The same command continues at the checkpoint of step {step} of {STEPS}." in said["error"]
        outcome = said["resumed"]
        assert (outcome["engine"], outcome["processes"]) == (NAMES[engine], 2)
        assert outcome["resumed_from"] == step
    logs = [LossLog(launched / f"{engine}-{name}" / "losses.jsonl") for name in ("whole-s", "s")]
    whole, again = (log.losses() for log in logs)
    assert len(whole) == STEPS
    assert again == whole
    one, other = (launched / f"{engine}-{name}.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()
