"""SmoothQuant against the formula, number by number, and what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama

from compresskit.calibration.statistics import LayerStats
from compresskit.data.spec import DataSpec
from compresskit.errors import SchemeError
from compresskit.modeling import open_model
from compresskit.quant.balance import Reader
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import parse
from compresskit.quant.smoothquant import SmoothQuant
from compresskit.quant.stage import Quantize
from tests.quant.test_quantize_stage import outlook, run


def readers() -> list[Reader]:
    torch.manual_seed(0)
    stats = LayerStats(num_tokens=9, input_abs_max_I=torch.tensor([0.5, 30.0, 2.0, 0.0, 8.0]))
    weights = [torch.randn(3, 5), torch.randn(2, 5)]
    for weight in weights:
        weight[:, 4] = 0
    return [Reader(weight, parse("w8a8"), stats) for weight in weights]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_the_formula(alpha: float) -> None:
    first, second = readers()
    scale_I = SmoothQuant(alpha=alpha).scale([first, second], torch.arange(5))
    for i, largest in enumerate([0.5, 30.0, 2.0]):
        weights = [abs(float(w)) for reader in (first, second) for w in reader.weight_OI[:, i]]
        assert float(scale_I[i]) == pytest.approx(largest**alpha / max(weights) ** (1 - alpha), rel=1e-5)
    assert scale_I[3:].tolist() == [1.0, 1.0], "where the input or all its weights are zero"


def test_only_what_norms_make_is_scaled_unless_asked() -> None:
    after_linear = [replace(reader, after_norm=False) for reader in readers()]
    assert torch.equal(SmoothQuant().scale(after_linear, torch.arange(5)), torch.ones(5))
    wanted = SmoothQuant().scale(readers(), torch.arange(5))
    assert torch.equal(SmoothQuant(norms_only=False).scale(after_linear, torch.arange(5)), wanted)


def test_channels_share_the_mean_of_their_scales() -> None:
    both = SmoothQuant().scale(readers(), torch.arange(5))
    shared = SmoothQuant().scale(readers(), torch.tensor([0, 1, 1, 2, 3]))
    assert float(shared[1]) == float(shared[2]) == pytest.approx(float((both[1] * both[2]).sqrt()), rel=1e-5)


def test_an_outlier_in_the_inputs_costs_less() -> None:
    """The output of a layer with both sides rounded, before and after."""
    torch.manual_seed(0)
    x_TI, weight_OI, scheme = torch.randn(50, 64), torch.randn(32, 64), parse("w8a8")
    x_TI[:, 7] *= 80
    stats = LayerStats(num_tokens=50, input_abs_max_I=x_TI.abs().amax(0))

    def error(scale_I: torch.Tensor) -> float:
        scaled_TI = x_TI / scale_I
        step_T1 = scaled_TI.abs().amax(-1, keepdim=True) / 127
        new_OI = RoundToNearest().quantize(weight_OI * scale_I, scheme).weight_OI
        output_TO = (scaled_TI / step_T1).round() * step_T1 @ new_OI.t()
        return float((output_TO - x_TI @ weight_OI.t()).square().mean())

    scale_I = SmoothQuant().scale([Reader(weight_OI, scheme, stats)], torch.arange(64))
    assert error(scale_I) < 0.2 * error(torch.ones(64))


def test_schemes_that_leave_inputs_alone_are_refused_by_the_plan(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path / "model", tie_word_embeddings=False))

    def said(scheme: str, **more: Any) -> str:
        stage = Quantize(
            "smoothquant", scheme=scheme, data=DataSpec(source="text.txt"), context_length=16, **more
        )
        return "; ".join(map(str, stage.faults(outlook(model), "stages[0]")))

    for scheme in ("w8a16", "w4a16-g32", "nf4"):
        assert "stages[0].scheme: expected a scheme that rounds inputs, such as w8a8" in said(scheme)
        assert "model.layers.0.self_attn.q_proj" in said(scheme)
    assert "w8a16 (model.layers.0.mlp.down_proj)" in said("w8a8", overrides={"*.down_proj": "w8a16"})
    assert said("w8a8", overrides={"*.down_proj": "none"}) == ""
    with pytest.raises(SchemeError, match="rounds inputs"):
        run(Quantize("smoothquant", scheme="w8a16"), model, tmp_path)
    for scheme in ("w8a8", "w8a8-static", "fp8", "w4a8-g32"):
        assert said(scheme) == ""
