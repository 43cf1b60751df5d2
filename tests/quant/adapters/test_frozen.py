"""Frozen weights: bitsandbytes' own values, zeros where they were, and no byte that an evaluation changes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from conftest import projections

from compresskit.formats.grid import Grid
from compresskit.modeling import ModelSource, load_model
from compresskit.quant.adapters.frozen import GridLinear
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse
from compresskit.training.lowrank.bits import freeze, frozen_weight, rounded
from compresskit.training.lowrank.frozen import frozen_model


@pytest.fixture
def weight_OI() -> torch.Tensor:
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.5] = 0
    return weight


def test_nf4_is_what_bitsandbytes_makes(weight_OI: torch.Tensor) -> None:
    packed, state = functional.quantize_4bit(weight_OI, quant_type="nf4", compress_statistics=True)
    layer = freeze(weight_OI, None, "nf4", dtype=torch.float32)
    assert torch.equal(frozen_weight(layer), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("base", ["nf4", "int8", "none"])
def test_the_layer_multiplies_with_the_weight_it_tells_and_keeps_zeros(
    weight_OI: torch.Tensor, base: str
) -> None:
    bias_O = torch.randn(48, generator=torch.Generator().manual_seed(1))
    layer = freeze(weight_OI, bias_O, base, dtype=torch.float32)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    frozen_OI = frozen_weight(layer)
    bound = {"nf4": 0.35, "int8": 0.02, "none": 0.0}[base] * weight_OI.abs().max()
    assert (frozen_OI - weight_OI).abs().max() <= bound
    assert (frozen_OI[weight_OI == 0] == 0).all()
    assert torch.equal(rounded(weight_OI, base), frozen_OI)
    # int8 also rounds its inputs while it multiplies.
    torch.testing.assert_close(
        layer(x), x @ frozen_OI.T + bias_O, rtol=0, atol=0.1 if base == "int8" else 1e-5
    )
    assert not layer.weight.requires_grad


def test_an_evaluation_leaves_every_byte_alone() -> None:
    """bitsandbytes would repack a layer of such a shape for good on a CPU with AVX512-BF16."""
    layer = freeze(torch.randn(64, 128), None, "nf4", dtype=torch.float32).eval()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(torch.randn(3, 128))
    after = layer.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a16", "fp8"])
def test_a_weight_on_a_grid_is_kept_in_bytes_to_the_bit(weight_OI: torch.Tensor, scheme: str) -> None:
    weight_OI = weight_OI.bfloat16()
    grid: Grid = grid_for(weight_OI, parse(scheme))
    weight_OI = grid.snap(weight_OI)
    layer = GridLinear(weight_OI, None, grid).float()
    assert torch.equal(layer.weight, weight_OI.float())
    assert layer.levels_OI.dtype == torch.uint8


def test_a_frozen_model_computes_what_the_model_does(dense: ModelSource) -> None:
    layers = frozenset(projections(dense))
    model = frozen_model(dense, layers, lambda _, w, b: freeze(w, b, "none", dtype=torch.float32))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load_model(dense)(input_ids=ids).logits)
    assert not any(p.requires_grad for p in model.parameters())
