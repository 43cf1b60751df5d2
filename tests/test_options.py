"""A method's own fields: their numbers are checked before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from compresskit.options import freeze_options, option_faults
from compresskit.quant import QUANTIZERS
from compresskit.quant.stage import Quantize


def faults(method: str, options: dict[str, Any]) -> str:
    frozen = freeze_options(options)
    found = option_faults(QUANTIZERS[method], frozen, where="stages[1]", stage=Quantize)
    return "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("method", "option", "value", "told"),
    [
        ("hqq", "norm", -1, "above 0"),
        ("hqq", "norm", 0.0, "above 0"),
        ("hqq", "beta", -5.0, "at least 1"),
        ("hqq", "growth", 0.9, "at least 1"),
        ("hqq", "iterations", -1, "at least 0"),
        ("smoothquant", "alpha", 7.0, "at least 0 and at most 1"),
        ("smoothquant", "alpha", float("nan"), "at least 0 and at most 1"),
        ("awq", "steps", -4, "at least 0"),
        ("awq", "clip_steps", -1, "at least 0"),
        ("awq", "least_range", -3.0, "above 0 and at most 1"),
        ("gptq", "damping", -1.0, "at least 0 and at most 1"),
        ("gptq", "damping", 5, "at least 0 and at most 1"),
    ],
)
def test_numbers_a_method_cannot_use_are_told_before_it_runs(
    method: str, option: str, value: float, told: str
) -> None:
    default = getattr(QUANTIZERS[method](), option)
    assert faults(method, {option: value}) == (
        f"stages[1].{option}: expected a number {told}, got {value!r}. "
        f"Leave {option} out, which is {default!r}, or choose one {told}."
    )
    assert faults(method, {option: default}) == ""


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("hqq", "iterations", 0),
        ("smoothquant", "alpha", 0),
        ("smoothquant", "alpha", 1),
        ("awq", "least_range", 1.0),
        ("gptq", "damping", 0.0),
        ("gptq", "damping", 1.0),
    ],
)
def test_the_ends_of_a_range_are_within_it(method: str, option: str, value: float) -> None:
    assert faults(method, {option: value}) == ""
