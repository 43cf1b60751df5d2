"""Losses on sentences under one process, DDP, FSDP2 and ZeRO-3: the same losses, the same model saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_engine_sentences
import pytest
import torch
from every_engine import NAMES
from every_engine_sentences import CLASSES, ENGINES, RUNS, STEPS, train
from ranks import two_ranks
from safetensors.torch import load_file
from tiny import tiny_bert
from torch import Tensor

from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 2e-5
"""Relative, of a loss at any of 10 steps: engines sum gradients in other orders, in fp32."""
CASES = [(run, engine) for run in RUNS for engine in ENGINES]
PARTS = {
    "encoder": ("embedding_cosine", "pairwise", "features"),
    "classifier": ("class_logits", "cross_entropy"),
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


def parts(scratch: Path, name: str) -> list[float]:
    return [record["parts"][name] for record in LossLog(scratch / "losses.jsonl").read() if "parts" in record]


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_losses_agree_step_by_step(run: str, engine: str, launched: Path, single: dict[str, Any]) -> None:
    mine, true = (launched / f"{run}-{name}-s" for name in (engine, "one"))
    found, expected = (LossLog(scratch / "losses.jsonl").losses() for scratch in (mine, true))
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, rel=TOLERANCE)
    for name in PARTS[run]:
        assert parts(mine, name) == pytest.approx(parts(true, name), rel=TOLERANCE)
    first = parts(true, PARTS[run][0])
    assert min(first[STEPS // 2 :]) < 0.8 * first[0], "nothing was learnt, so nothing was compared"
    outcome = json.loads((launched / f"{run}-{engine}.json").read_text())
    assert (outcome["engine"], outcome["processes"]) == (NAMES[engine.removesuffix("-again")], 2)
    assert outcome["validation_loss"] == pytest.approx(single[run][0].validation_loss, rel=TOLERANCE)
    assert outcome["final_parts"] == pytest.approx(dict(single[run][0].final_parts), rel=TOLERANCE)
    assert tuple(outcome["warnings"]) == single[run][0].warnings


@pytest.mark.parametrize(("run", "engine"), CASES)
def test_the_model_alone_is_saved_and_its_zeros_are_held(
    run: str, engine: str, launched: Path, single: dict[str, Any]
) -> None:
    saved = load_file(launched / f"{run}-{engine}.safetensors")
    _, held, true = single[run]
    assert saved.keys() == true.keys()
    assert not any("projection" in name for name in saved)
    for name, tensor in true.items():
        if not name.endswith("key.bias"):  # attention does not see it: rounding alone moves it
            torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for layer in held:
        assert not saved[f"{layer}.weight"][:, ::2].any()
