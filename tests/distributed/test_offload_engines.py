"""Offload under ZeRO-1/2/3 trains as one process does; DDP and FSDP2 exchange while they compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_engine_offload
import pytest
from every_engine import NAMES, make_model
from every_engine_offload import (
    OFFLOADED,
    SAVED,
    STEPS,
    TAUGHT,
    TRACED,
    TRACED_STEPS,
    ZERO_FIELDS,
    ZEROED,
    train_held,
    train_traced,
    train_zeros,
    wide_model,
)
from every_engine_teachers import VOCABULARY, teacher_of
from every_engine_teachers import train as train_taught
from ranks import two_ranks
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor

from compresskit.distill.teacher import Replica
from compresskit.modeling import ModelSource
from compresskit.training.trace import read_overlap, trace_path
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TOLERANCE = 2e-6
"""Relative, of a loss at any step: engines sum gradients in other orders, in fp32."""
BACKWARD = "autograd::engine::evaluate_function"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("offload")
    settings: dict[str, Any] = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    tiny_llama(out / "model", vocab_size=VOCABULARY, **settings)
    tiny_llama(out / "student", vocab_size=VOCABULARY, **settings)
    tiny_llama(out / "tied", seed=1, vocab_size=VOCABULARY, num_hidden_layers=4, **settings)
    return out


@pytest.fixture(scope="module")
def single(place: Path) -> Mapping[str, Any]:
    """One process, the whole batch at once: losses of every kind of run, and the held weights at the end."""
    saved: dict[str, Tensor] = {}
    whole: dict[str, Any] = {"micro_batch_size": 8}
    train_held(place / "one-held", saved, checkpoint_every=0, **whole)
    train_zeros("rigl", ModelSource(place / "model"), place / "one-rigl", replace(ZERO_FIELDS, **whole))
    train_taught(place, "tied", place / "one-taught", teacher_of(place, "tied", Replica), **whole)
    train_traced(place / "one-wide", wide_model(), trace=0, **whole)
    runs = {"held": "one-held", "rigl": "one-rigl-s", "taught": "one-taught", "wide": "one-wide"}
    return {name: losses(place / folder) for name, folder in runs.items()} | {"saved": saved}


@pytest.fixture(scope="module")
def launched(place: Path, request: pytest.FixtureRequest) -> Path:
    """Two ranks, two rows at a time; beside them one process."""
    pytest.importorskip("deepspeed")
    with two_ranks(every_engine_offload, place):
        request.getfixturevalue("single")
    return place


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


def told(launched: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{run}.json").read_text())
    return found


def assert_near(found: list[float], true: list[float], steps: int, tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(true) == steps
    assert found == pytest.approx(true, rel=tolerance)
    assert true[-1] < true[0], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize("run", OFFLOADED)
def test_losses_are_those_of_one_process_also_after_a_restart(run: str, launched: Path, single: Any) -> None:
    assert_near(losses(launched / run), single["held"], STEPS)
    outcome = told(launched, run)
    assert (outcome["engine"], outcome["processes"]) == (NAMES[run.partition("-")[0]], 2)
    assert outcome["resumed_from"] == SAVED


@pytest.mark.parametrize("run", OFFLOADED)
def test_deepspeed_really_offloads_and_our_optimizer_steps(run: str, launched: Path) -> None:
    made = told(launched, f"{run}-made")
    parameters = run == "zero3-parameters"
    assert made["told"] == {"optimizer": "cpu", "param": "cpu" if parameters else "none"}
    third = ["offload_optimizer", "offload_param"] if parameters else ["offload_optimizer"]
    assert made["does"] == (third if run.startswith("zero3") else ["cpu_offload"])
    assert made["stepper"] == "torch.optim.adamw"
    assert made["overlap_comm"] is True


@pytest.mark.parametrize("run", OFFLOADED)
def test_held_zeros_stay(run: str, launched: Path, single: Any) -> None:
    saved, (before, held) = load_file(launched / f"{run}.safetensors"), make_model()
    for layer in held:
        was = before.get_submodule(layer).weight
        assert not saved[f"{layer}.weight"][was == 0].any(), layer
        assert (saved[f"{layer}.weight"][was != 0] != 0).all(), layer
    assert saved.keys() == single["saved"].keys()


@pytest.mark.parametrize("run", ZEROED)
def test_zeros_can_be_moved(run: str, launched: Path, single: Any) -> None:
    """Every copy that is offloaded changes too, else later steps would bring the old weights back."""
    assert_near(losses(launched / f"rigl-{run}-s"), single["rigl"], ZERO_FIELDS.steps or 0)
    mine, true = (ModelSource(launched / name) for name in (f"rigl-{run}", "one-rigl"))
    for layer in true.anatomy.linears:
        name = f"{layer}.weight"
        assert ((mine.tensor(name) == 0) == (true.tensor(name) == 0)).all(), layer


def test_a_teacher_is_offloaded_beside_its_student(launched: Path, single: Any) -> None:
    assert_near(losses(launched / TAUGHT), single["taught"], 10, 2e-5)
    assert told(launched, TAUGHT)["engine"] == "deepspeed ZeRO-3"
    kept = told(launched, f"{TAUGHT}-made")["kept"]
    assert kept
    assert all(kept)


@pytest.mark.parametrize("run", TRACED)
def test_overlap_changes_no_loss(run: str, launched: Path, single: Any) -> None:
    assert_near(losses(launched / run), single["wide"], TRACED_STEPS)
    assert told(launched, run)["engine"] == TRACED[run]["strategy"]
    assert told(launched, f"{run}-made")["views"] == run.endswith("ddp")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("run", TRACED)
def test_exchanges_begin_before_the_backward_pass_ends(run: str, rank: int, launched: Path) -> None:
    """But for DDP with one bucket: it adds gradients up when there is nothing left to compute."""
    trace = trace_path(launched / run, rank)
    spans = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    works = [span["ts"] for span in spans if span["name"].startswith(BACKWARD)]
    talks = [span["ts"] for span in spans if span["name"].startswith("gloo:")]
    early = [start for start in talks if min(works) < start < max(works)]
    assert talks
    assert bool(early) == (run != "one-bucket-ddp")
    assert (read_overlap(trace).overlapped_ms > 0) or not early
    prefetched = [span for span in spans if span["name"].startswith("FSDP::forward_prefetch")]
    assert len(prefetched) == (3 if run == "traced-fsdp" else 0)
    if not rank:
        said = json.loads((launched / run / "overlap.json").read_text())
        assert said["overlapped_ms"] == read_overlap(trace).overlapped_ms
