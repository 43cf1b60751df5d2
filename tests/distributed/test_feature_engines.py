"""Feature losses under one process, DDP, FSDP2 and ZeRO-1/2/3: the same losses, the same model saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import every_engine_features
import pytest
from every_engine_features import ENGINES, RUNS, VOCABULARY, train
from ranks import assert_losses_agree, assert_model_alone, parts, two_ranks
from tiny import tiny_llama
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [(run, engine) for run in RUNS for engine in ENGINES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features")
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 1}
    settings |= {"eos_token_id": 2}
    tiny_llama(out / "teacher", seed=1, num_hidden_layers=4, **settings)
    tiny_llama(out / "wide", **settings)
    tiny_llama(out / "narrow", hidden_size=16, intermediate_size=32, **settings)
    return out


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, Any]:
    """One process, the whole batch at once."""
    found: dict[str, Any] = {}
    for run in RUNS:
        saved: dict[str, Tensor] = {}
        found[run] = (*train(place, run, place / f"{run}-one-s", saved, micro_batch_size=8), saved)
    return found


@pytest.fixture(scope="module")
def launched(place: Path, request: pytest.FixtureRequest) -> Path:
    """Two ranks, two rows at a time: each step is 2 ranks x 2 passes x 2 rows; beside them one process."""
    pytest.importorskip("deepspeed")
    with two_ranks(every_engine_features, place):
        request.getfixturevalue("single")
    return place


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_agree_step_by_step(run: str, engine: str, launched: Path, single: dict[str, Any]) -> None:
    assert_losses_agree(launched, run, engine, single[run][0])
    true = parts(launched / f"{run}-one-s", "forward_kl")
    assert true[-1] < 0.8 * true[0], "nothing was learnt, so nothing was compared"
    assert len(single[run][0].final_parts) == 2 + len(RUNS[run]["features"])


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_model_alone_is_saved_and_its_zeros_are_held(
    run: str, engine: str, launched: Path, single: dict[str, Any]
) -> None:
    _, held, true = single[run]
    assert_model_alone(launched, run, engine, held, true)
