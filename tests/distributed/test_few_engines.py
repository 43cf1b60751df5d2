"""Few parameters trained under one process, DDP, FSDP2 and ZeRO-2/3: the same losses, the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_engine_few
import pytest
import torch
from every_engine import NAMES
from every_engine_few import ALL_FIELDS, BROKEN, ENGINES, KEPT, STEPS, WAYS, layers_of, model_of, train
from ranks import two_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from compresskit.modeling import ModelSource
from compresskit.training.bias_norm import biases_and_norms
from compresskit.training.watch import LossLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CASES = [(way, engine) for way in WAYS for engine in ENGINES]
TOLERANCE = 2e-5
"""Relative, of a loss: engines sum gradients in other orders, in fp32."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two rows at a time; beside them, one process with the whole batch at once."""
    pytest.importorskip("deepspeed")
    place = tmp_path_factory.mktemp("few")
    shape: dict[str, Any] = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32}
    tiny_llama(place / "model", **shape, mlp_bias=True, initializer_range=0.2)
    tensors = load_file(place / "model" / "model.safetensors")
    for name in (n for n in tensors if n.endswith("proj.weight")):
        groups = tensors[name].reshape(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    save_file(tensors, place / "model" / "model.safetensors", {"format": "pt"})
    tiny_llama(place / "bf16", **shape, mlp_bias=True, dtype=torch.bfloat16)
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(narrow, place / "bf16" / "model.safetensors", {"format": "pt"})
    with two_ranks(every_engine_few, place):
        for way in WAYS:
            train(way, place, f"{way}-one", replace(ALL_FIELDS, micro_batch_size=8))
    return place


def outcome(launched: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((launched / f"{name}.json").read_text())
    return found


def losses(out: Path) -> list[float]:
    return LossLog(out.with_name(f"{out.name}-s") / "losses.jsonl").losses()


@pytest.mark.parametrize(("way", "engine"), CASES)
def test_the_engine_that_ran_is_the_one_asked_for(way: str, engine: str, launched: Path) -> None:
    found = outcome(launched, f"{way}-{engine}")
    assert (found["engine"], found["processes"]) == (NAMES[engine], 2)
    assert found["validation_loss"] < found["validation_loss_before"]


@pytest.mark.parametrize(("way", "engine"), CASES)
def test_losses_agree_step_by_step(way: str, engine: str, launched: Path) -> None:
    mine, true = (losses(launched / f"{way}-{name}") for name in (engine, "one"))
    assert len(mine) == len(true) == STEPS
    assert mine == pytest.approx(true, rel=TOLERANCE)
    assert min(true) < 0.97 * true[0], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize(("way", "engine"), CASES)
def test_zeros_stay_and_nothing_else_moves(way: str, engine: str, launched: Path) -> None:
    source = model_of(way, launched)
    few = set(biases_and_norms(source.anatomy))
    layers = () if way in KEPT else layers_of(source)
    wanted = few if way == "bias_norm" else {f"{layer}.weight" for layer in layers}
    made, one = (ModelSource(launched / f"{way}-{name}") for name in (engine, "one"))
    close = {"rtol": 1e-2, "atol": 1e-3} if way == "bf16" else {"rtol": 1e-3, "atol": 1e-4}
    for name in source.names():
        before, now = source.tensor(name), made.tensor(name)
        assert torch.equal(before, now) == (name not in wanted), name
        torch.testing.assert_close(now, one.tensor(name), **close)
        if name.endswith("proj.weight"):
            assert torch.equal(before == 0, now == 0), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", KEPT)
def test_an_adapter_beside_the_model_is_that_of_one_process(way: str, engine: str, launched: Path) -> None:
    mine, true = (
        load_file(launched / f"{way}-{name}" / "adapter" / "adapter_model.safetensors")
        for name in (engine, "one")
    )
    assert mine.keys() == true.keys()
    for name, tensor in true.items():
        # Adam makes a whole step of a gradient that is nothing but rounding.
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_16_bits_take_half_and_are_split(engine: str, launched: Path) -> None:
    held = {w: outcome(launched, f"{w}-{engine}")["parameter_bytes"] for w in ("lora", "bf16")}
    source = ModelSource(launched / "model")
    linears = [source.anatomy.linears[name] for name in layers_of(source)]
    weights = sum(n.in_features * n.out_features for n in linears)
    assert held["lora"] - held["bf16"] == 2 * weights // (2 if engine in ("fsdp", "zero3") else 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", BROKEN)
def test_a_restart_changes_no_byte(way: str, engine: str, launched: Path) -> None:
    whole, again = (outcome(launched, f"{way}{kind}-{engine}") for kind in ("", "-broken"))
    assert (whole["resumed_from"], again["resumed_from"]) == (0, 3)
    assert whole["validation_loss_before"] == again["validation_loss_before"]
    one, two = (launched / f"{way}{kind}-{engine}" / "model.safetensors" for kind in ("", "-broken"))
    assert one.read_bytes() == two.read_bytes()
