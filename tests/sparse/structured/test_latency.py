"""Cutting to a latency; the oracle is a clock that is known, and every shape tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import OutputError, PatternError
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured import latency
from compresskit.sparse.structured.cut import Cut
from compresskit.sparse.structured.deadline import RUNGS, largest_within
from compresskit.sparse.structured.latency import (
    Latency,
    Stopwatch,
    at_depth,
    random_model,
    stopwatch_for,
    timed_depths,
)
from compresskit.sparse.structured.outline import Outline
from compresskit.sparse.structured.shapes import Shape
from compresskit.sparse.structured.surgery import Patient, Surgery
from compresskit.timing import Runner
from tests.sparse.structured.zoo import build, outlook, run
from tests.tiny import tiny_llama


def clock(patient: Patient) -> Latency:
    """3 ms outside, 1 ms a block, 1 ms each 1,000 parameters; half of it for the prompt."""
    total = 3 + len(patient.anatomy.blocks) + patient.anatomy.num_parameters / 1000
    return Latency(prefill_ms=total / 2, decode_ms=total / 8, decode_tokens=4)


def chosen(model: ModelSource, watch: Callable[[Patient], Latency] = clock, **options: Any) -> Surgery:
    patient = Patient(model.config, model.anatomy, model.directory)
    return Outline(Cut(**options), patient, watch).surgery()


@pytest.fixture
def kept_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of parameters of the models that were timed, by a clock that is known."""
    found: list[int] = []

    def time(self: Stopwatch, patient: Patient) -> Latency:
        found.append(patient.anatomy.num_parameters)
        return clock(patient)

    monkeypatch.setattr(Stopwatch, "time", time)
    return found


@given(
    times=st.lists(st.floats(0.1, 100), min_size=2, max_size=40).map(sorted),
    milliseconds=st.floats(0.01, 120),
)
def test_the_search_finds_what_trying_everything_finds(times: list[float], milliseconds: float) -> None:
    asked: list[int] = []

    def ms_of(shape: Shape) -> float:
        asked.append(shape.blocks)
        return times[shape.blocks]

    def shape_of(fraction: float) -> Shape:
        return Shape(round(fraction * (len(times) - 1)), {})

    if milliseconds < times[0] or times[-1] <= milliseconds:
        with pytest.raises(PatternError):
            largest_within(milliseconds, shape_of, ms_of, times[-1])
        return
    found = largest_within(milliseconds, shape_of, ms_of, times[-1])
    assert found.blocks == max(
        shape_of(n / RUNGS).blocks for n in range(RUNGS) if ms_of_rung(n, times) <= milliseconds
    )
    assert len(asked) == len(set(asked)) <= 9


def ms_of_rung(rung: int, times: list[float]) -> float:
    return times[round(rung / RUNGS * (len(times) - 1))]


@pytest.mark.parametrize(
    ("name", "trim"),
    [
        ("LlamaForCausalLM", "width"),
        ("LlamaForCausalLM", "depth"),
        ("GPT2LMHeadModel", "both"),
        ("BertForMaskedLM", "width"),
    ],
)
def test_most_parameters_that_are_in_time_stay(name: str, trim: str, tmp_path: Path) -> None:
    model = build(name, tmp_path, num_hidden_layers=6, vocab_size=40, max_position_embeddings=40)
    options = {"trim": trim, "multiple": 4}
    whole_ms = clock(Patient(model.config, model.anatomy, model.directory)).request_ms
    limit = 0.6 * whole_ms
    got = chosen(model, milliseconds=limit, **options)
    assert got.latency is not None
    assert got.latency_before is not None
    assert got.latency_before.request_ms == whole_ms
    left = Patient(got.config, got.anatomy, model.directory)
    assert got.latency.request_ms == clock(left).request_ms <= limit
    assert (got.blocks < 6) == (trim != "width")
    assert bool(got.units) == (trim != "depth")
    for hundredths in range(40, 90, 4):
        try:
            other = chosen(model, parameters=hundredths / 100, **options)
        except PatternError:  # no legal shape is near
            continue
        assert other.latency is not None
        if other.latency.request_ms <= limit:
            assert got.anatomy.num_parameters >= 0.97 * other.anatomy.num_parameters


def test_what_is_given_stays_given(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    got = chosen(model, milliseconds=30.0, layers=2, ffn=16)
    assert (got.blocks, got.units["ffn"]) == (2, 16)
    easy = chosen(model, milliseconds=50.0, layers=2)
    assert (easy.blocks, dict(easy.units)) == (2, {}), "two blocks are enough"
    assert "ffn: all stay; what else goes is enough." in easy.notes


def test_the_plan_says_it_and_the_run_cuts_what_was_planned(
    tmp_path: Path, kept_times: Path, asked: list[int]
) -> None:
    model = build("LlamaForCausalLM", tmp_path / "model")
    stage = Prune("cut", options={"milliseconds": 40, "decode_tokens": 4, "trim": "both"})
    assert stage.faults(outlook(model), "s") == []
    assert asked[0] == model.anatomy.num_parameters
    assert len(asked) == len(set(asked)) == len(list(kept_times.iterdir())) <= 9
    forecast, times = stage.forecast(outlook(model)), len(asked)
    result, after = run(stage, model, tmp_path)
    assert len(asked) == times, "times are kept"
    assert after.anatomy.num_parameters == forecast.after.anatomy.num_parameters
    (note,) = [note for note in forecast.notes if "forecast" in note]
    told = result.metrics["forecast"]
    ms = 3 + len(after.anatomy.blocks) + after.anatomy.num_parameters / 1000
    assert told == {"prefill_ms": ms / 2, "decode_ms": ms / 8, "decode_tokens": 4, "request_ms": ms}
    assert result.metrics["forecast_before"]["request_ms"] == pytest.approx(
        7 + model.anatomy.num_parameters / 1000
    )
    assert note.startswith("A prompt of 60 tokens and 4 tokens after it are forecast to take ")
    assert f" {ms:.4g} ms ({ms / 2:.4g} ms, then {ms / 8:.4g} ms a token) instead of " in note
    assert note.endswith("timed on cpu with random weights in float32 and 1 thread.")
    for number, lengths in enumerate(((59, 4), (60, 3)), 2):
        other = {"milliseconds": 40, "trim": "both", "prompt_tokens": lengths[0], "decode_tokens": lengths[1]}
        Prune("cut", options=other).forecast(outlook(model))
        assert len(asked) == number * times, "another request, another time"


def test_a_crowded_machine_is_told(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    watch = stopwatch_for(model.config, 4.0, "cpu", 8, 4)
    busy = Latency(prefill_ms=1.0, decode_ms=1.0, decode_tokens=4, load_average=1e6)
    calm = Latency(prefill_ms=1.0, decode_ms=1.0, decode_tokens=4)
    assert len(watch.notes(calm, calm)) == 1
    assert f"delete {watch.cache} to time again" in watch.notes(calm, busy)[1]


def test_damaged_times_are_taken_again(tmp_path: Path, kept_times: Path, asked: list[int]) -> None:
    model = build("LlamaForCausalLM", tmp_path / "model")
    stage = Prune("cut", options={"layers": 2, "timed": True})
    stage.forecast(outlook(model))
    paths = sorted(kept_times.iterdir())
    assert len(asked) == len(paths) == 2
    paths[0].write_text('{"prefill_ms": 1')
    with pytest.warns(UserWarning, match="is damaged"):
        stage.forecast(outlook(model))
    assert len(asked) == 3
    stage.forecast(outlook(model))
    assert len(asked) == 3


def test_times_that_cannot_be_kept(tmp_path: Path, kept_times: Path, asked: list[int]) -> None:
    model = build("LlamaForCausalLM", tmp_path / "model")
    kept_times.parent.write_text("a file")
    with pytest.raises(OutputError, match="set COMPRESSKIT_CACHE to another folder"):
        Prune("cut", options={"layers": 2, "timed": True}).forecast(outlook(model))


def test_large_models_are_timed_at_two_depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("LlamaForCausalLM", tmp_path, num_hidden_layers=12)
    shapes = model.anatomy.parameter_shapes.items()
    block_bytes = 4 * sum(prod(shape) for name, shape in shapes if name.startswith("model.layers.0."))
    assert timed_depths(model.anatomy, 4) == (12,)
    monkeypatch.setattr(latency, "LARGE_BYTES", 5 * block_bytes - 1)
    assert timed_depths(model.anatomy, 4) == (2, 5)
    assert timed_depths(model.anatomy, 2) == (5, 10)
    monkeypatch.setattr(latency, "LARGE_BYTES", 1)
    assert timed_depths(model.anatomy, 4) == (1, 2)

    def sample(runners: list[Runner], **_: Any) -> list[list[tuple[float, float]]]:
        depths = [runner.model.config.num_hidden_layers for runner in runners]
        return [[(2 + 3 * n, 0.5 + 0.25 * n)] * 2 + [(99, 99)] * (n - 1) for n in depths]

    monkeypatch.setattr(latency, "sample", sample)
    watch = stopwatch_for(model.config, 4.0, "cpu", 8, 4)
    found = watch.time(Patient(model.config, model.anatomy, model.directory))
    assert (found.prefill_ms, found.decode_ms) == (2 + 3 * 12, 0.5 + 0.25 * 12)
    assert at_depth(12, (12,), [7.0]) == 7.0


def test_a_real_clock(tmp_path: Path, kept_times: Path) -> None:
    model = open_model(tiny_llama(tmp_path / "model"))
    torch.manual_seed(7)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    stage = Prune("cut", options={"layers": 1, "timed": True, "prompt_tokens": 6, "decode_tokens": 2})
    assert stage.faults(outlook(model), "s") == []
    result, _ = run(stage, model, tmp_path)
    for told in (result.metrics["forecast"], result.metrics["forecast_before"]):
        assert told["decode_tokens"] == 2
        assert told["prefill_ms"] > 0
        assert told["request_ms"] == told["prefill_ms"] + 2 * told["decode_ms"] > told["prefill_ms"]
    assert len(list(kept_times.iterdir())) == 2
    after = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert after == threads + 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_models_that_do_not_decode(tmp_path: Path, kept_times: Path) -> None:
    model = build("BertForMaskedLM", tmp_path / "model")
    stage = Prune("cut", options={"layers": 2, "timed": True, "prompt_tokens": 6})
    assert stage.faults(outlook(model), "s") == []
    note = stage.forecast(outlook(model)).notes[-1]
    assert "A prompt of 6 tokens" in note or "more work" in note
    result, _ = run(stage, model, tmp_path)
    told = result.metrics["forecast"]
    assert (told["decode_ms"], told["decode_tokens"]) == (0.0, 0)
    assert told["request_ms"] == told["prefill_ms"] > 0


def test_a_random_model_is_as_a_loaded_one_but_for_its_weights(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    patient = Patient(model.config, model.anatomy, model.directory)
    made, plain = random_model(model.config, patient, torch.float32, "cpu"), load_model(model)

    def facts(tensors: Iterator[tuple[str, torch.Tensor]]) -> list[Any]:
        return [(name, one.shape, one.dtype, one.requires_grad) for name, one in tensors]

    assert facts(made.named_parameters()) == facts(plain.named_parameters())
    assert facts(made.named_buffers()) == facts(plain.named_buffers())
    attention = "_attn_implementation"
    assert getattr(made.config, attention) == getattr(plain.config, attention)
    assert not made.training


def test_the_dtype_is_the_stored_one(tmp_path: Path) -> None:
    config = build("LlamaForCausalLM", tmp_path).config
    config.dtype = None
    assert stopwatch_for(config, 2.0, "cpu", 8, 4).dtype == torch.bfloat16
    assert stopwatch_for(config, 4.0, "cpu", 8, 4).dtype == torch.float32
    config.dtype = torch.float16
    assert stopwatch_for(config, 2.0, "cpu", 8, 4).dtype == torch.float16


def test_faults(tmp_path: Path, kept_times: Path, asked: list[int]) -> None:
    model = build("LlamaForCausalLM", tmp_path / "model")
    total = 7 + model.anatomy.num_parameters / 1000

    def said(**options: Any) -> str:
        return "\n".join(map(str, Prune("cut", options=options).faults(outlook(model), "s")))

    both = "s.milliseconds: expected parameters or milliseconds, got both. Leave one of them out."
    assert said(milliseconds=3.0, parameters=0.5) == both
    assert "s.milliseconds: expected a number above 0, got 0" in said(milliseconds=0.0)
    assert said(parameters=0.5, decode_tokens=3) == (
        "s.decode_tokens: expected nothing where no request is timed, got 3. "
        "Leave it out, or set timed: true."
    )
    assert "at most 64 together, the model's positions, got 60 and 5" in (
        said(milliseconds=3.0, prompt_tokens=60, decode_tokens=5)
    )
    assert "got 64 and 16" in said(milliseconds=3.0, prompt_tokens=64)
    assert not asked
    assert said(milliseconds=1000) == (
        f"s.milliseconds: expected less than the {total:.4g} that the model takes as it is, got 1000. "
        "Lower it, or leave the cut out."
    )
    short = said(milliseconds=4, trim="depth", decode_tokens=4)
    least = 4 + min(asked) / 1000
    assert short == (
        f"s.milliseconds: expected at least {least:.4g}, what the smallest legal shape takes, got 4. "
        f"Raise it, lower multiple, or trim both; the model takes {total:.4g} as it is."
    )
    assert "s.milliseconds: expected something left to choose, got every number given" in (
        said(milliseconds=20, trim="depth", layers=2)
    )
