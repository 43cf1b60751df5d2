"""Scores that learn: their gradient, and the zeros they lead to, beside the same written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama

from compresskit.modeling import open_model
from compresskit.sparse.base import Moment
from compresskit.sparse.masked import Masked, MaskedLinear
from compresskit.sparse.movement import Movement
from compresskit.sparse.pattern import LayerUnstructured

LAYER = "model.layers.0.mlp.up_proj"
STEPS = 8


def test_zeros_are_where_scores_are_lowest() -> None:
    """As many as gradual magnitude would make after the last step that was a multiple of two."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, score_OI = (torch.randn(6, 8, generator=generator) for _ in range(2))
    method = Movement(pattern=LayerUnstructured(0.75), update_every=2, end=0.75)
    for step in range(STEPS + 1):
        since = step if step >= 6 else step - step % 2
        count = round(48 * 0.75 * (1 - max(0.0, 1 - since / 6) ** 3))
        made_OI = method.update(weight_OI, Moment(step, STEPS, score_OI=score_OI))
        lowest = sorted(range(48), key=score_OI.flatten().tolist().__getitem__)[:count]
        assert sorted((made_OI == 0).flatten().nonzero().flatten().tolist()) == sorted(lowest)
        assert torch.equal(made_OI[made_OI != 0], weight_OI[made_OI != 0])


@pytest.mark.parametrize("passes", [1, 2])
def test_a_layer_computes_and_learns_as_in_the_paper(passes: int, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path)))
    masked = Masked(
        method="movement",
        options={"update_every": 1, "end": 0.75},
        ends={LAYER: "75%:layer"},
        steps=STEPS,
        passes_per_step=passes,
    )
    layer: Any = masked.load(source).get_submodule(LAYER).train()
    assert isinstance(layer, MaskedLinear)
    with torch.no_grad():
        layer.score_OI.copy_(torch.randn(layer.score_OI.shape))
    method = Movement(pattern=LayerUnstructured(0.75), update_every=1, end=0.75)
    for done in range(passes * (STEPS + 1)):
        layer.zero_grad()
        input_BI, after_BO = torch.randn(5, 32), torch.randn(5, 64)
        step = min(done // passes, STEPS)
        weight_OI, score_OI = layer.weight.detach(), layer.score_OI.detach()
        kept_OI = method.update(weight_OI, Moment(step, STEPS, score_OI=score_OI))
        output_BO = layer(input_BI)
        torch.testing.assert_close(output_BO, input_BI @ kept_OI.T)
        output_BO.backward(after_BO)
        dense_OI = after_BO.T @ input_BI
        torch.testing.assert_close(layer.weight.grad, dense_OI * (kept_OI != 0))
        torch.testing.assert_close(layer.score_OI.grad, dense_OI * weight_OI)
    assert int(layer.passes) == passes * (STEPS + 1)
    layer.eval()(input_BI)
    assert int(layer.passes) == passes * (STEPS + 1), "an evaluation is no step"


def test_the_score_rises_where_a_weight_moves_away_from_zero(tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path)))
    layer: Any = Masked(method="movement", ends={LAYER: "50%"}, steps=STEPS).load(source).get_submodule(LAYER)
    before_OI = layer.weight.detach().clone()
    layer.train()(torch.randn(5, 32)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-4).step()
    away_OI = layer.weight.detach().abs() - before_OI.abs()
    sure_OI = (away_OI.abs() > 1e-7) & (layer.weight.detach() * before_OI > 0)
    assert sure_OI.any()
    assert torch.equal(layer.score_OI.detach()[sure_OI] > 0, away_OI[sure_OI] > 0)
