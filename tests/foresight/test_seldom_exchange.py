"""Forecasts of ranks that exchange seldom: which ways combine, what they hold, and when they pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import compresskit as ck
from compresskit.foresight.candidates import Row
from compresskit.foresight.devices import HOST_LINK_BYTES_S, Machine, machine
from compresskit.foresight.forecast import Forecast, Foresight
from compresskit.foresight.table import told

LATE = {
    "strategy": "deepspeed",
    "offload": "optimizer",
    "overlap": False,
    "synchronise": "zenflow",
    "synchronise_every": 5,
}
SLOW, FAST = {"gpus": 2, "nodes": 2, "link": "1Gbit"}, {"gpus": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration without weights, whose computing outlasts an exchange on one machine."""
    path = tmp_path_factory.mktemp("configs") / "config.json"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    path.write_text(config.to_json_string())
    return str(path)


def where(**changes: Any) -> Machine:
    return machine(gpu="a100", **changes)


def foreseen(model: str, machine: Machine, **changes: Any) -> Foresight:
    stage = ck.Finetune(**{"batch_size": 64, "context_length": 256, "precision": "bf16", **changes})
    return ck.foresee(ck.Recipe(model=model, stages=(stage,)), machine)


def forecast(model: str, machine: Machine, **changes: Any) -> Forecast:
    (one,) = foreseen(model, machine, **changes).forecasts
    return one


def row(model: str, machine: Machine, way: str = "ddp", /, **changes: Any) -> Any:
    """The row of one pass that computes nothing twice."""
    rows = forecast(model, machine, **changes).rows
    return next(r for r in rows if _way(r) == (way, "none") and r.passes == 1)


def _way(row: Row) -> tuple[str, str]:
    return row.combination.strategy, row.combination.checkpointing


def legal(one: Forecast) -> set[str]:
    return {r.combination.strategy for r in one.rows if not r.refused}


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_ranks_step_alone_under_ddp_only(model: str, name: str) -> None:
    one = forecast(model, where(**SLOW), synchronise=name)
    assert legal(one) == {"ddp"}
    assert {r.refused.partition(":")[0] for r in one.rows if r.refused} == {
        "alone-under-ddp",
        "pipeline-alone",
    }


def test_zenflow_is_a_row_only_of_zero_2_with_offload(model: str) -> None:
    one = forecast(model, where(**FAST), **LATE)
    assert legal(one) == {"zero2 + offload"}
    assert all(r.passes == 1 for r in one.rows if not r.refused)


def test_where_all_is_refused_the_table_says_so(model: str) -> None:
    text = told(foreseen(model, where(**FAST), **LATE | {"overlap": True}))
    assert "Every way is refused" in text
    assert "zenflow-overlap" in text


def test_weights_that_zenflow_cannot_step_are_named(tmp_path: Path) -> None:
    """A convolution's have three dimensions."""
    from transformers import MambaConfig

    config = MambaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=4, architectures=["MambaForCausalLM"]
    )
    path = tmp_path / "config.json"
    path.write_text(config.to_json_string())
    one = forecast(str(path), where(**FAST), context_length=32, **LATE)
    assert not legal(one)
    assert any("conv1d.weight of (128, 1, 4)" in r.refused for r in one.rows)


def test_what_an_exchange_keeps(model: str) -> None:
    plain = row(model, where(**SLOW))
    count = plain.peak.terms["weights"] / 4
    ways = ("local_sgd", "diloco")
    kept = {way: row(model, where(**SLOW), synchronise=way).peak.terms for way in ways}
    late = row(model, where(**SLOW), synchronise="diloco", synchronise_delay=2).peak.terms
    assert kept["local_sgd"]["synchronise"] == 0  # no more than a bucket, after the step
    assert kept["diloco"]["synchronise"] == 8 * count
    assert late["synchronise"] == 16 * count
    assert plain.peak.terms["synchronise"] == 0
    columns = row(model, where(**FAST), "zero2 + offload", **LATE).peak.terms
    assert columns["synchronise"] == pytest.approx(1.2 * count)


def test_gradients_of_ranks_that_step_alone_are_no_views_of_buckets(model: str) -> None:
    """DDP's buckets are there, and empty."""
    plain, alone = (row(model, where(**SLOW), **c).peak for c in ({}, {"synchronise": "local_sgd"}))
    assert alone.terms["buffers"] == plain.terms["buffers"] == plain.terms["weights"]
    assert alone.bytes >= plain.bytes


def test_on_slow_links_seldom_exchange_is_faster_and_on_fast_ones_it_hardly_matters(model: str) -> None:
    slow, fast = (
        [row(model, where(**links), **c).pace for c in ({}, {"synchronise": "local_sgd"})]
        for links in (SLOW, FAST)
    )
    assert slow[1].tokens_s > 5 * slow[0].tokens_s
    assert slow[1].compute_s == slow[0].compute_s
    assert fast[1].total_s == pytest.approx(fast[0].total_s, rel=0.1)


def test_a_step_has_its_share_of_an_exchange(model: str) -> None:
    one, eight = (row(model, where(**SLOW), synchronise="diloco", synchronise_every=n).pace for n in (1, 8))
    plain = row(model, where(**SLOW)).pace
    assert one.communication_s == plain.communication_s == pytest.approx(8 * eight.communication_s)
    assert eight.exposed_s == eight.communication_s  # nobody computes meanwhile
    assert one.step_s - plain.step_s == pytest.approx(8 * (eight.step_s - plain.step_s))


def test_what_comes_late_is_hidden_by_the_steps_meanwhile(model: str) -> None:
    now, soon, late = (
        row(model, where(**SLOW), synchronise="diloco", synchronise_every=500, synchronise_delay=n).pace
        for n in (0, 1, 499)
    )
    assert soon.exposed_s == pytest.approx(now.exposed_s - (soon.compute_s + soon.step_s) / 500)
    assert late.exposed_s == 0 < now.exposed_s
    assert late.communication_s == now.communication_s


def test_zenflow_steps_on_the_cpu_and_gathers_weights_less_often(model: str) -> None:
    plain = row(model, where(**SLOW), "zero2 + offload", overlap=False).pace
    five, many = (
        row(model, where(**SLOW), "zero2 + offload", **LATE | {"synchronise_every": n}).pace for n in (5, 25)
    )
    assert many.step_s < five.step_s < plain.step_s
    assert many.communication_s < five.communication_s < plain.communication_s
    assert many.exposed_s == many.communication_s
    count = row(model, where(**SLOW)).peak.terms["weights"] / 4
    assert many.step_s > 2 * 4 * count / 4 / HOST_LINK_BYTES_S  # its part of the gradients, there and back


def test_a_hint_where_seldom_exchange_would_pay(model: str) -> None:
    slow, fast = (forecast(model, where(**links)) for links in (SLOW, FAST))
    (hint,) = (note for note in slow.notes if "diloco" in note)
    seldom = forecast(model, where(**SLOW), synchronise="diloco").best
    assert seldom is not None
    assert seldom.pace is not None
    assert f"it would take {seldom.pace.total_s:.3g} s" in hint
    assert not any("diloco" in note for note in fast.notes)


def test_no_hint_where_ranks_may_not_step_alone_or_do_already(model: str) -> None:
    for changes in ({"precision": "fp16"}, {"synchronise": "local_sgd"}):
        one = forecast(model, where(**SLOW), **changes)
        assert one.best is not None
        assert not any("On these links" in note for note in one.notes)


def test_the_table_says_how_often_and_what_it_does_not_time(model: str) -> None:
    changes = {
        "synchronise": "diloco",
        "synchronise_every": 50,
        "synchronise_delay": 10,
        "synchronise_from": 9,
    }
    text = told(foreseen(model, where(**SLOW), **changes))
    assert "bf16, diloco every 50 steps, 10 late" in text
    assert "The first 9 steps" in text
    assert "\n  synchronise " in text
