"""AWQ against a search that runs the inputs, one candidate and one group after another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compresskit.calibration.statistics import STATISTICS, Accumulator, LayerStats
from compresskit.data.spec import DataSpec
from compresskit.modeling import load_model, load_tokenizer, open_model
from compresskit.quant.affine import grid_for
from compresskit.quant.awq import ActivationAware, scaling_error
from compresskit.quant.balance import Reader
from compresskit.quant.scheme import Scheme, parse
from compresskit.quant.stage import Quantize
from tests.quant.test_quantize_stage import run

TOKENS, INPUTS = 200, 32


def inputs(seed: int = 0) -> Tensor:
    """Correlated inputs (T, I), some of them large."""
    torch.manual_seed(seed)
    x_TI = torch.randn(TOKENS, INPUTS) @ (torch.eye(INPUTS) + 0.2 * torch.randn(INPUTS, INPUTS))
    return x_TI * torch.where(torch.rand(INPUTS) > 0.85, 12.0, 1.0)


def stats_of(x_TI: Tensor) -> LayerStats:
    sums = Accumulator(frozenset(STATISTICS), INPUTS, torch.device("cpu"))
    sums.add(x_TI)
    return sums.finish("layer")


def readers_of(x_TI: Tensor, scheme: str, rows: tuple[int, ...] = (6, 4)) -> list[Reader]:
    torch.manual_seed(7)
    return [Reader(torch.randn(n, INPUTS) * 0.1, parse(scheme), stats_of(x_TI)) for n in rows]


def rounded(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    return grid_for(weight_OI, scheme).snap(weight_OI)


def output_error(readers: list[Reader], scale_I: Tensor, x_TI: Tensor) -> float:
    """The mean squared change of the outputs, by running the tokens one at a time."""
    total = 0.0
    for reader in readers:
        new_OI = rounded(reader.weight_OI * scale_I, reader.scheme)
        for x_I in x_TI:
            total += float((new_OI @ (x_I / scale_I) - reader.weight_OI @ x_I).square().sum())
    return total / len(x_TI)


def candidates(readers: list[Reader], x_TI: Tensor, steps: int) -> list[Tensor]:
    """Powers of the inputs' mean size, alone and over powers of the weights' mean share of their groups."""
    size_I = x_TI.abs().mean(0)
    shares = []
    for reader in readers:
        group = reader.scheme.group_size or INPUTS
        for row_I in reader.weight_OI.abs():
            shares.append(torch.cat([part / (part.max() + 1e-6) for part in row_I.split(group)]))
    share_I = torch.stack(shares).mean(0)
    found = []
    for step in range(steps + 1):
        power = step / steps
        found += [size_I**power, size_I**power / (share_I ** (1 - power) + 1e-4)]
    return [scale_I / (scale_I.max() * scale_I.min()).sqrt() for scale_I in found]


def test_the_scales_are_the_best_of_a_slow_search() -> None:
    for scheme in ("w4a16-g8", "w4a16-channel", "w4a16-g16-asym", "w8a8"):
        x_TI = inputs()
        readers = readers_of(x_TI, scheme)
        got_I = ActivationAware(steps=6).scale(readers, torch.arange(INPUTS))
        tried = candidates(readers, x_TI, 6)
        errors = [output_error(readers, scale_I, x_TI) for scale_I in tried]
        best_I = tried[errors.index(min(errors))]
        torch.testing.assert_close(got_I, best_I, rtol=1e-4, atol=1e-6)
        assert abs(scaling_error(readers, best_I) / min(errors) - 1) < 1e-4
        assert min(errors) < output_error(readers, torch.ones(INPUTS), x_TI), "scaling was of use here"


def test_scaling_is_never_worse_than_none() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x_TI = torch.randn(TOKENS, INPUTS)
        readers = readers_of(x_TI, "w4a16-g8")
        scale_I = ActivationAware(by_weight=seed % 2 == 0).scale(readers, torch.arange(INPUTS))
        assert scaling_error(readers, scale_I) <= scaling_error(readers, torch.ones(INPUTS))
    assert torch.equal(ActivationAware(steps=0).scale(readers, torch.arange(INPUTS)), torch.ones(INPUTS))


def test_inputs_from_one_channel_get_one_scale() -> None:
    x_TI = inputs()
    channel_I = torch.arange(INPUTS) // 4
    scale_I = ActivationAware().scale(readers_of(x_TI, "w4a16-g8"), channel_I)
    assert torch.equal(scale_I, scale_I[channel_I * 4])
    assert not torch.equal(scale_I, torch.ones(INPUTS))


def test_ranges_are_the_best_of_a_slow_search() -> None:
    x_TI, scheme = inputs(3), parse("w4a16-g8")
    torch.manual_seed(1)
    weight_OI = torch.randn(5, INPUTS)
    weight_OI[:, ::8] *= 4
    method = ActivationAware(clip_steps=4, least_range=0.4)
    got = method.quantize(weight_OI, scheme, stats_of(x_TI))
    expected_OI, clipped = torch.empty_like(weight_OI), 0
    for o in range(5):
        parts = []
        for start in range(0, INPUTS, 8):
            w_M, x_TM = weight_OI[o : o + 1, start : start + 8], x_TI[:, start : start + 8]
            tries = [grid_for(w_M, scheme, 1 - 0.15 * k).snap(w_M) for k in range(5)]
            errors = [float(((new_M - w_M) @ x_TM.t()).square().sum()) for new_M in tries]
            parts.append(tries[errors.index(min(errors))])
        row_I, whole_I = torch.cat(parts, 1), rounded(weight_OI[o : o + 1], scheme)
        costs = [float(((new_I - weight_OI[o]) @ x_TI.t()).square().sum()) for new_I in (row_I, whole_I)]
        expected_OI[o] = row_I if costs[0] < costs[1] else whole_I
        clipped += costs[0] < costs[1]
    assert clipped > 0
    assert torch.equal(got.weight_OI, expected_OI)
    assert torch.equal(got.grid.snap(got.weight_OI), got.weight_OI)


def test_without_clipping_it_rounds_to_nearest() -> None:
    weight_OI = torch.randn(4, INPUTS)
    got = ActivationAware(clip_steps=0).quantize(weight_OI, parse("w4a16-g8"), stats_of(inputs()))
    assert torch.equal(got.weight_OI, rounded(weight_OI, parse("w4a16-g8")))


def test_gptq_may_round_what_was_scaled() -> None:
    x_TI, weight_OI, scheme = inputs(), torch.randn(16, INPUTS), parse("w4a16-g8")
    costs = {}
    for gptq in (False, True):
        new_OI = ActivationAware(gptq=gptq).quantize(weight_OI, scheme, stats_of(x_TI)).weight_OI
        costs[gptq] = float(((new_OI - weight_OI) @ x_TI.t()).square().sum())
    assert costs[True] < 0.8 * costs[False]


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_a_real_model_loses_less_than_by_rounding_to_nearest(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    """The whole stage; how far its predictions move on other stories than those it was calibrated on."""
    source = open_model(shared_data / "models" / name)
    data = DataSpec(source=str(shared_data / "tinystories" / "train_first1000.jsonl"))
    lines = (shared_data / "tinystories" / "valid_head_clean.jsonl").read_text().splitlines()[:8]
    tokenizer = load_tokenizer(source)
    stories = [tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :256] for line in lines]
    overrides = {"*.down_proj": "w4a16-g4"} if name == "stories260K" else {}
    dense, moved = load_model(source), {}
    for method in ("rtn", "awq"):
        stage = Quantize(
            method, scheme="w4a16-g32", overrides=overrides, data=data, samples=8, context_length=256
        )
        stage = stage if method == "awq" else replace(stage, data=None)
        result, after = run(stage, source, tmp_path / method)
        assert result.warnings == ()
        model = load_model(after)
        with torch.no_grad():
            pairs = [(m(ids).logits.log_softmax(-1) for m in (dense, model)) for ids in stories]
            moved[method] = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs)
    assert moved["awq"] < 0.85 * moved["rtn"], moved


def test_inputs_that_never_were_scale_nothing_badly() -> None:
    """A channel that is always zero must not get a scale of zero, nor spoil the others."""
    x_TI = inputs()
    x_TI[:, 3] = 0
    readers = readers_of(x_TI, "w4a16-g8")
    scale_I = ActivationAware().scale(readers, torch.arange(INPUTS))
    assert bool(torch.isfinite(scale_I).all())
    assert bool((scale_I > 0).all())
    zero = readers_of(torch.zeros(TOKENS, INPUTS), "w4a16-g8")
    assert torch.equal(ActivationAware().scale(zero, torch.arange(INPUTS)), torch.ones(INPUTS))
    assert torch.isfinite(
        ActivationAware().quantize(zero[0].weight_OI, zero[0].scheme, zero[0].stats).weight_OI
    ).all()
