"""Losses on sentences under one process, DDP, FSDP2 and ZeRO-3: the same losses, the same model saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import every_engine_sentences
import pytest
from every_engine_sentences import CLASSES, ENGINES, RUNS, STEPS, train
from ranks import assert_losses_agree, assert_model_alone, parts, two_ranks
from tiny import tiny_bert
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [(run, engine) for run in RUNS for engine in ENGINES]
PARTS = {
    "encoder": ("embedding_cosine", "pairwise", "relation"),
    "classifier": ("class_logits", "cross_entropy", "agreement"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sentences")
    tiny_bert(out / "encoder-teacher", seed=1, num_hidden_layers=3)
    tiny_bert(out / "encoder", hidden_size=16, num_attention_heads=2)
    tiny_bert(out / "classifier-teacher", seed=1, classes=CLASSES, num_hidden_layers=3)
    tiny_bert(out / "classifier", classes=CLASSES)
    return out


@pytest.fixture(scope="module")
def single(place: Path) -> dict[str, Any]:
    """One process, two rows at a time, as each rank has: pairs are those of a pass."""
    found: dict[str, Any] = {}
    for run in RUNS:
        saved: dict[str, Tensor] = {}
        found[run] = (*train(place, run, place / f"{run}-one-s", saved), saved)
    return found


@pytest.fixture(scope="module")
def launched(place: Path, request: pytest.FixtureRequest) -> Path:
    """Two ranks, two rows at a time: each step is 2 ranks x 2 passes x 2 rows; beside them one process."""
    pytest.importorskip("deepspeed")
    with two_ranks(every_engine_sentences, place):
        request.getfixturevalue("single")
    return place


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_agree_step_by_step(run: str, engine: str, launched: Path, single: dict[str, Any]) -> None:
    assert_losses_agree(launched, run, engine, single[run][0])
    first = parts(launched / f"{run}-one-s", PARTS[run][0])
    assert min(first[STEPS // 2 :]) < 0.8 * first[0], "nothing was learnt, so nothing was compared"
    assert single[run][0].final_parts.keys() == set(PARTS[run])


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_model_alone_is_saved_and_its_zeros_are_held(
    run: str, engine: str, launched: Path, single: dict[str, Any]
) -> None:
    _, held, true = single[run]
    # Attention does not see the biases of keys.
    assert_model_alone(launched, run, engine, held, true, unseen="key.bias")
