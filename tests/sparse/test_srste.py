"""What a masked layer computes, and what its weight learns, beside the paper's equation written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor

from compresskit.modeling import load_model, open_model
from compresskit.sparse.masked import Masked, MaskedLinear
from compresskit.sparse.pattern import NM, LayerUnstructured, RowUnstructured
from compresskit.sparse.srste import SRSTE
from compresskit.training.access import cast_like

LAYER = "model.layers.0.mlp.up_proj"


def slow_mask(weight_OI: Tensor, keep: int, of: int) -> Tensor:
    """True for the ``keep`` largest of each group, one group after another."""
    mask = torch.zeros_like(weight_OI, dtype=torch.bool)
    for row, values in enumerate(weight_OI.abs().tolist()):
        for start in range(0, len(values), of):
            best = sorted(range(start, start + of), key=lambda i: -values[i])[:keep]
            for i in best:
                mask[row, i] = True
    return mask


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("passes", [1, 2])
def test_forward_and_gradient_are_those_of_the_paper(keep: int, of: int, passes: int, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path)))
    pull = {"pull": 0.3}
    model = Masked(method="srste", options=pull, ends={LAYER: f"{keep}:{of}"}, passes_per_step=passes).load(
        source
    )
    layer: Any = model.get_submodule(LAYER)
    assert isinstance(layer, MaskedLinear)
    input_BI, after_BO = torch.randn(5, 32), torch.randn(5, 64)
    weight_OI, mask = layer.weight.detach().clone(), slow_mask(layer.weight.detach(), keep, of)
    output_BO = layer(input_BI)
    torch.testing.assert_close(output_BO, input_BI @ (weight_OI * mask).T)
    output_BO.backward(after_BO)
    expected_OI = after_BO.T @ input_BI + 0.3 / passes * ~mask * weight_OI
    torch.testing.assert_close(layer.weight.grad, expected_OI)
    assert torch.equal(layer.weight, weight_OI)


def test_what_is_saved_is_what_was_computed(tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model")))
    masked = Masked(method="srste", ends={LAYER: "2:4"})
    model = masked.load(source)
    (tmp_path / "out").mkdir()
    masked.save(source, tmp_path / "out", model.state_dict())
    made, ids = open_model(str(tmp_path / "out")), torch.arange(12)[None]
    plain = load_model(made, dtype="auto", device="cpu")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert NM(2, 4).missing(made.weight_OI(LAYER) == 0) == ()
    other = LAYER.replace("up", "gate")
    assert torch.equal(made.weight_OI(other), source.weight_OI(other))


def test_stored_in_bfloat16_it_keeps_what_was_computed_with(tmp_path: Path) -> None:
    """Four numbers that are one in bfloat16 are still four while training."""
    source = open_model(str(tiny_llama(tmp_path / "model", dtype=torch.bfloat16)))
    masked = Masked(method="srste", ends={LAYER: "2:4"})
    stored = {name: t.dtype for name, t in masked.load(source).state_dict().items()}
    trained = {name: source.tensor(name).float() for name in source.names()}
    trained[f"{LAYER}.weight"] = 1 + torch.tensor([1e-3, 3e-3, 0.0, 2e-3]).repeat(64, 8)
    (tmp_path / "out").mkdir()
    masked.save(source, tmp_path / "out", cast_like(trained, stored))
    made_OI = open_model(str(tmp_path / "out")).weight_OI(LAYER)
    assert made_OI.dtype == torch.bfloat16
    assert torch.equal(made_OI != 0, torch.tensor([False, True, False, True]).repeat(64, 8))


def test_only_groups_will_do() -> None:
    method = SRSTE(pattern=NM(2, 4))
    assert not any(method.due(step, 10) for step in range(11))
    assert method.unfit(NM(1, 4)) == ""
    for pattern in (RowUnstructured(0.5), LayerUnstructured(0.5)):
        assert "2:4" in method.unfit(pattern)
    assert replace(method, pull=0.0).pull == 0
