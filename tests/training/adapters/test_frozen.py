"""Frozen weights: bitsandbytes' own values, zeros where they were, and no byte that an evaluation changes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from conftest import projections

from compresskit.errors import EngineError
from compresskit.formats.grid import Grid
from compresskit.modeling import ModelSource, load_model
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse
from compresskit.training.adapters.bits import freeze, frozen_weight, rounded
from compresskit.training.adapters.frozen import frozen_linear, frozen_model
from compresskit.training.adapters.on_grid import GridLinear


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


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_of_16_bits_stays_one_and_computes_what_a_wide_one_does(
    weight_OI: torch.Tensor, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    draw = torch.Generator().manual_seed(1)
    bias_O = torch.randn(48, generator=draw)
    x = torch.randn(2, 5, 40, generator=draw)
    narrow = frozen_linear(weight_OI.to(dtype), bias_O).float()
    wide = frozen_linear(weight_OI.to(dtype).float(), bias_O)
    assert sum(p.nbytes for p in narrow.parameters()) == 2 * 48 * 40 + 4 * 48
    assert torch.equal(narrow.weight, wide.weight)
    found = []
    for layer in (narrow, wide):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            made = layer(inputs)
        (made.float() * torch.arange(48)).sum().backward()
        found.append((made, inputs.grad))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert not any(p.requires_grad for p in narrow.parameters())


def test_what_an_engine_has_cast_is_no_weight_any_more(weight_OI: torch.Tensor) -> None:
    layer = frozen_linear(weight_OI.bfloat16(), None).to(torch.bfloat16)
    with pytest.raises(EngineError, match="bytes that the engine leaves alone"):
        layer(torch.zeros(1, 40))


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
