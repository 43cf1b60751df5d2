"""The choice by measured cost: against every combination, and measured on a real model the slow way."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from compresskit.calibration.sensitivity import measure_costs
from compresskit.errors import SchemeError
from compresskit.modeling import load_model, open_model
from compresskit.quant.affine import grid_for
from compresskit.quant.auto import candidate_faults, choose, rounding
from compresskit.quant.scheme import Scheme, parse
from compresskit.quant.stage import Quantize

FOUR, EIGHT = parse("w4a16-g32"), parse("w8a16")


def costs_of(*pairs: tuple[float, float]) -> dict[str, dict[Scheme, float]]:
    return {f"layer{i}": {FOUR: four, EIGHT: eight} for i, (four, eight) in enumerate(pairs)}


def test_the_choice_is_the_best_of_all_for_layers_of_one_size() -> None:
    costs = costs_of((0.5, 0.01), (0.02, 0.01), (0.9, 0.1), (0.3, 0.0))
    sizes = dict.fromkeys(costs, (64, 64))
    least, target = FOUR.bits_per_weight(64, 16), 6.5
    assert least < target
    best = min(
        (sum(costs[n][s] for n, s in zip(costs, combination, strict=True)), combination)
        for combination in product((EIGHT, FOUR), repeat=4)
        if sum(s.bits_per_weight(64, 16) for s in combination) / 4 <= target
    )
    got = choose(costs, sizes, target, 16, where="quantize")
    assert tuple(got.schemes.values()) == best[1]
    assert got.bits <= target
    assert str(got) == f"2 x w4a16-g32, 2 x w8a16: {got.bits:.2f} bits"


def test_bytes_are_weighed_by_size_and_the_budget_holds() -> None:
    costs = costs_of((0.10, 0.0), (0.11, 0.0))
    sizes = {"layer0": (64, 64), "layer1": (640, 64)}
    got = choose(costs, sizes, 5.0, 16, where="quantize")
    assert [str(s) for s in got.schemes.values()] == ["w8a16", "w4a16-g32"], "a tenth of the bytes, as much"
    with pytest.raises(SchemeError, match=r"target_bits: expected at most 4 bits, got 4\.50 with"):
        choose(costs, sizes, 4.0, 16, where="quantize")


def test_what_each_layer_may_get(tmp_path: Path) -> None:
    anatomy = open_model(tiny_llama(tmp_path, intermediate_size=44)).anatomy
    stage = Quantize(scheme="auto", candidates=("w8a16", "w4a16-g32"), overrides={"*.q_proj": "w8a8"})
    found = stage.possible(anatomy)
    assert found["model.layers.0.mlp.down_proj"] == (EIGHT,)
    assert found["model.layers.0.mlp.up_proj"] == (FOUR, EIGHT), "those of the least bits first"
    assert found["model.layers.0.self_attn.q_proj"] == (parse("w8a8"),)
    less = replace(stage, candidates=("w4a16-g32", "w4a16-g16")).possible(anatomy)
    assert less["model.layers.1.mlp.down_proj"] == ()


def test_candidates_are_checked() -> None:
    assert candidate_faults(("w4a16", "w8a16"), 4.5, "stages[0]") == []
    said = " ".join(map(str, candidate_faults(("nf4", "w3a16"), 20, "stages[0]")))
    assert "schemes that go together, got nf4" in said
    assert "a quantisation scheme, got 'w3a16'" in said
    assert "more than 0 and at most 16, got 20" in said
    assert "at least two schemes" in str(candidate_faults(("w8a16",), 5, "x")[0])


@pytest.mark.parametrize("text", ["w8a8", "w8a8-static", "w4a8-g32", "fp8"])
def test_a_candidate_that_rounds_inputs_is_refused_as_their_rounding_is_not_measured(text: str) -> None:
    (fault,) = candidate_faults((text, "w8a16"), 9.0, "stages[0]")
    assert "schemes that leave inputs alone" in str(fault)
    assert f"got {text}. Name {text} as scheme" in str(fault)


def test_candidates_in_one_text_are_one_mistake_told_once() -> None:
    (fault,) = candidate_faults(("w4a16-g32,w8a16",), 6.0, "stages[0]")
    assert "got 'w4a16-g32,w8a16'" in str(fault)
    assert "repeat the option" in str(fault)


def test_costs_are_those_of_running_the_whole_model(tmp_path: Path) -> None:
    source = open_model(tiny_llama(tmp_path, tie_word_embeddings=False))
    model = load_model(source)
    torch.manual_seed(0)
    ids = torch.randint(0, 258, (2, 24))
    rows = [{"input_ids": row, "position_ids": torch.arange(24)} for row in ids]
    layers = [n for n in source.anatomy.linears if "up_proj" in n or "v_proj" in n or n == "lm_head"]
    dtypes = dict.fromkeys(layers, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    candidates = dict.fromkeys(layers, (FOUR, EIGHT))
    got = measure_costs(model, source.anatomy, candidates, rows, rounding(dtypes))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        want_lp = model(ids).logits.log_softmax(-1)
        for layer in layers:
            weight = model.get_parameter(f"{layer}.weight")
            weight.copy_(grid_for(weight, FOUR).snap(weight))
            lp = model(ids).logits.log_softmax(-1)
            slow = (want_lp.exp() * (want_lp - lp)).sum(-1).mean().item()
            weight.copy_(before[f"{layer}.weight"])
            assert got[layer][FOUR] == pytest.approx(slow, rel=1e-3, abs=1e-9), layer
            assert got[layer][FOUR] > 0
    assert got["lm_head"][FOUR] > 10 * got["lm_head"][EIGHT] > 0
