"""What C kernels are handed: addresses; so every tensor behind one is checked, whatever the defaults are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compresskit.kernels.bitmap import pack
from compresskit.kernels.dispatch import refusal
from compresskit.kernels.packed.bitmap import BitmapRows, bitmap_expand, bitmap_linear

pytestmark = pytest.mark.skipif(bool(refusal("cpu", "bitmap_linear")), reason="there is no C compiler")
OUT, IN = 24, 128
PARTS = {"words": 0, "values": 1, "starts": 2, "scales": 3}


def packed(groups: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-9, 10, (OUT, IN), generator=generator)
    weight = weight * (torch.rand(OUT, IN, generator=generator) < 0.5)
    scales = torch.ones(OUT, groups) if groups else None
    made = pack(weight.to(torch.int8 if groups else torch.float32), scales)
    return list(BitmapRows().pack(made, torch.device("cpu")))


def other(part: str, change: Callable[[Tensor], Tensor], groups: int = 0) -> list[Tensor]:
    parts = packed(groups)
    parts[PARTS[part]] = change(parts[PARTS[part]])
    return parts


X = torch.ones(3, IN)


@pytest.mark.parametrize(
    ("inputs", "parts", "bias", "told"),
    [
        (X.to(torch.int8), packed(), None, "no kernel for inputs of torch.int8"),
        (X, packed(), torch.ones(OUT, dtype=torch.int8), "a bias of torch.int8"),
        (X, packed(), torch.ones(1), "a bias of"),
        (X, other("words", lambda t: t.t().contiguous().t()), None, "in strides"),
        (X, other("words", lambda t: t.to(torch.int32)), None, "words are torch.int32"),
        (X, other("values", lambda t: t[:-1].clone()), None, "values and 64 bytes after them"),
        (X, other("starts", lambda t: t.to(torch.int32)), None, "starts are torch.int32"),
        (X, other("starts", lambda t: t[:-1]), None, "starts are torch.int64"),
        (X, other("starts", lambda t: t + 64), None, "values and 64 bytes after them"),
        (X, other("scales", lambda t: t.to(torch.bfloat16), groups=2), None, "scales torch.bfloat16"),
        (X, other("scales", lambda t: t[1:], groups=2), None, "scales torch.float32 of (23, 2)"),
        (X, other("scales", lambda t: t[:, :0], groups=2), None, "0 groups of scales beside"),
        (torch.ones(3, 127), packed(groups=2), None, "127 inputs"),
    ],
)
def test_what_c_would_read_past_is_refused(
    inputs: Tensor, parts: list[Tensor], bias: Tensor | None, told: str
) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
        bitmap_linear(inputs, *parts, bias)


@pytest.mark.parametrize(("width", "dtype"), [(10, torch.float32), (300, torch.float32), (IN, torch.int8)])
def test_a_dense_weight_of_another_width_or_type_is_refused(width: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"bitmap_expand"):
        bitmap_expand(*packed(), width, dtype)


@pytest.mark.parametrize("tokens", [1, 16, 80])
def test_the_defaults_of_torch_do_not_reach_the_kernels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, inputs = packed(groups=2), torch.ones(tokens, IN)
    expected = bitmap_linear(inputs, *parts, None)
    given: Any = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert torch.equal(bitmap_linear(inputs, *parts, None), expected)
    finally:
        torch.set_default_dtype(given)
