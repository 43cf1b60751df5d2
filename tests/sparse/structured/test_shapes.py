"""Legal numbers of units, and shapes for a wanted number of parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compresskit.errors import PatternError
from compresskit.modeling import open_model
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured.dimensions import Dimension
from compresskit.sparse.structured.keys import Keys
from compresskit.sparse.structured.shapes import choose_units, legal_units
from tests.sparse.structured.zoo import FAMILIES, GROUPED, build, follows, outlook, planned, run
from tests.tiny import tiny_llama

NO_KEYS = Keys(())


@given(
    units=st.integers(1, 40),
    size=st.integers(1, 16),
    parts=st.integers(1, 4),
    multiple=st.sampled_from([1, 8, 64]),
    share=st.floats(0.01, 0.99),
)
def test_a_fraction_is_rounded_to_the_nearest_legal_number(
    units: int, size: int, parts: int, multiple: int, share: float
) -> None:
    width = Dimension("heads", units, size, parts, NO_KEYS, ())
    legal = legal_units(width, multiple)
    assert legal == [n for n in range(1, units) if n * size % multiple == 0]
    try:
        got = choose_units(share, width, legal, multiple)
    except PatternError:
        assert not legal or abs(units - share * units) <= abs(legal[-1] - share * units)
        return
    assert got in legal
    assert all(abs(got - share * units) <= abs(other - share * units) for other in [*legal, units])


@given(units=st.integers(2, 40), parts=st.integers(1, 4), asked=st.integers(1, 200))
def test_a_number_is_taken_as_it_is_or_refused_with_the_nearest(units: int, parts: int, asked: int) -> None:
    width = Dimension("heads", units, 8, parts, NO_KEYS, ())
    legal = legal_units(width, 8)
    if asked % parts == 0 and asked // parts < units:
        assert choose_units(asked, width, legal, 8) * parts == asked
        return
    with pytest.raises(PatternError) as caught:
        choose_units(asked, width, legal, 8)
    named = [int(number) for number in re.findall(r"\d+", str(caught.value).split("nearest legal ")[1])]
    best = min((n * parts for n in legal), key=lambda n: abs(n - asked))
    assert abs(named[0] - asked) == abs(best - asked) or abs(named[-1] - asked) == abs(best - asked)


def test_heads_that_follow_leave_whole_channels_and_multiples() -> None:
    heads = Dimension("heads", 12, 64, 1, NO_KEYS, ())
    hidden = Dimension("hidden", 768, 1, 1, NO_KEYS, ())
    assert legal_units(heads, 128, follows=hidden) == [2, 4, 6, 8, 10]
    assert (
        legal_units(
            Dimension("heads", 3, 4, 1, NO_KEYS, ()), 1, follows=Dimension("hidden", 16, 1, 1, NO_KEYS, ())
        )
        == []
    )


def faults(model: Any, **options: Any) -> str:
    return "\n".join(map(str, Prune("cut", options=options).faults(outlook(model), "s")))


def test_numbers_that_are_not_legal_name_those_that_are(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    assert faults(model, heads=3) == (
        "s.heads: expected a legal number of query heads, fewer than 8, got 3. "
        "The nearest legal ones are 2 and 4."
    )
    assert (
        "s.ffn: expected a legal number of neurons, fewer than 40, got 20. "
        "The nearest legal ones are 16 and 24." in (faults(model, ffn=20))
    )
    assert (
        "s.hidden: expected fewer than 32 hidden channels in whole groups, "
        "got none that makes a multiple of 64" in (faults(model, hidden=0.5, multiple=64))
    )
    assert "Lower heads; the largest legal number is 4, which is 0.5." in faults(model, heads=0.9)
    # transformers wants a Llama's heads to divide its channels: six do not divide 32, but 24.
    assert "nearest legal ones are 2 and 4" in faults(model, heads=6)
    assert faults(model, heads=6, hidden=24) == ""
    assert "s.hidden: expected a legal number of hidden channels, fewer than 32, got 16" in (
        faults(model, heads=6, hidden=16)
    )


def test_a_width_that_follows_another_is_said_to(tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", tmp_path)
    assert "Set hidden instead: the heads follow it." in faults(model, heads=0.5)
    assert faults(model, heads=0.5, hidden=0.5) == ""
    assert "s.heads: expected 2 of 4, which follow from 16 hidden channels, got 1" in (
        faults(model, heads=1, hidden=16)
    )


def test_a_number_that_happens_to_count_as_many_is_not_taken_for_the_heads(tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", tmp_path / "model", chunk_size_feed_forward=4)
    _, after = run(Prune("cut", options={"hidden": 0.5}), model, tmp_path)
    assert (after.config.n_embd, after.config.n_head, after.config.chunk_size_feed_forward) == (16, 2, 4)


def test_one_key_value_head_cannot_be_shared_out(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path, num_key_value_heads=1)
    said = faults(model, heads=0.5)
    assert (
        "s.heads: expected fewer than 4 query heads in whole groups of 4 that share keys and values" in said
    )


def test_heads_that_share_a_norm_stay_and_it_is_said(tmp_path: Path) -> None:
    config = transformers.Olmo2Config(**{key: value for key, value in GROUPED.items() if key != "head_dim"})
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert faults(model, heads=0.5) == (
        "s.heads: expected heads that can go one by one, "
        "got one group: they share a norm, or keys and values. Cut layers only, or another model."
    )
    assert "expected keys for the hidden size 32 alone, got none" in faults(model, hidden=0.5)
    notes = planned(model, parameters=0.8).notes
    assert notes[0].startswith("ffn: ")
    assert "heads: all stay; expected heads that can go one by one, got one group" in notes[2]


@pytest.mark.parametrize("trim", ["width", "depth", "both"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BertForMaskedLM"])
def test_half_of_the_parameters(name: str, trim: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model", num_hidden_layers=6, vocab_size=40, max_position_embeddings=40)
    stage = Prune("cut", options={"parameters": 0.52, "trim": trim, "multiple": 4})
    assert stage.faults(outlook(model), "s") == []
    result, after = run(stage, model, tmp_path)
    left = after.anatomy.num_parameters
    assert left == pytest.approx(0.52 * model.anatomy.num_parameters, rel=0.05)
    assert left == stage.forecast(outlook(model)).after.anatomy.num_parameters
    assert left == result.metrics["parameters_kept"]
    assert (len(after.anatomy.blocks) < 6) == (trim != "width")
    assert bool(result.metrics["units_kept"]) == (trim != "depth")


@pytest.mark.parametrize(
    "options",
    [
        {"parameters": 0.5},
        {"parameters": 0.62, "trim": "depth"},
        {"parameters": 0.5, "trim": "both"},
        {"parameters": 0.4, "layers": 4, "hidden": 32},
    ],
)
def test_half_a_model_generates(options: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny_llama(
        tmp_path / "model",
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = open_model(directory)
    stage = Prune("cut", options=options)
    result, after = run(stage, model, tmp_path)
    assert after.bytes == stage.forecast(outlook(model)).after.checkpoint_bytes
    plain = AutoModelForCausalLM.from_pretrained(after.directory)
    assert plain.num_parameters() == pytest.approx(
        options["parameters"] * model.anatomy.num_parameters, rel=0.05
    )
    assert plain.num_parameters() == result.metrics["parameters_kept"]
    made = plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    if "layers" in options:
        assert result.metrics["units_kept"]["hidden"] == 32
        assert len(after.anatomy.blocks) == 4


def test_shares_are_even_where_they_can_be(tmp_path: Path) -> None:
    model = build(
        "LlamaForCausalLM",
        tmp_path,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        vocab_size=16,
        num_hidden_layers=8,
    )
    surgery = planned(model, parameters=0.42, trim="both", multiple=1)
    shares = [
        surgery.blocks / 8,
        surgery.units["ffn"] / 256,
        surgery.units["heads"] / 8,
        surgery.units["hidden"] / 64,
    ]
    assert max(shares) / min(shares) < 1.2


def test_targets_that_cannot_be_met(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    total = model.anatomy.num_parameters
    assert (
        "s.parameters: expected a fraction near one that a legal shape leaves, got 0.001. The nearest is"
        in (faults(model, parameters=0.001))
    )
    # One block is less than nine tenths of four, whatever the widths.
    said = faults(model, parameters=0.9, layers=1)
    one = Prune("cut", options={"layers": 1}).forecast(outlook(model)).after.anatomy.num_parameters
    assert f"The nearest is {one / total:.3g} ({one} of {total} parameters)" in said
    assert "something left to choose, got every number given" in faults(
        model, parameters=0.5, trim="depth", layers=2
    )
    assert "s.trim: expected width, depth, both, got 'widths'. Did you mean: width" in (
        faults(model, parameters=0.5, trim="widths")
    )
    assert "s.parameters: expected a number between 0 and 1, got 1.5" in faults(model, parameters=1.5)
    assert "s.multiple: expected a number at least 1, got 0" in faults(model, ffn=0.5, multiple=0)


def test_a_width_that_is_not_there_stays_and_is_named(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path, num_key_value_heads=1)
    surgery = planned(model, parameters=0.5)
    assert "heads" not in surgery.units
    assert (
        "heads: all stay; expected more than one group, got one: they share keys and values." in surgery.notes
    )
    wide = build("LlamaForCausalLM", tmp_path / "3", intermediate_size=256)
    notes = planned(wide, parameters=0.63, multiple=64).notes
    assert "heads: all stay; no fewer than 2 make a multiple of 64." in notes
    assert "hidden: all stay; no fewer than 32 make a multiple of 64." in notes
    assert surgery.anatomy.num_parameters == pytest.approx(0.5 * model.anatomy.num_parameters, rel=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_notes_say_what_goes(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    notes = Prune("cut", options={"layers": 2, "hidden": 0.55, "ffn": 0.6}).forecast(outlook(model)).notes
    assert notes[0] == "2 of 4 blocks go."
    said = " ".join(notes)
    assert "hidden: 16 of 32 hidden channels stay, the legal number nearest to 0.55." in said
    assert ("as many as the hidden channels leave" in said) == follows(name)
