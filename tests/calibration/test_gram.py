"""The Gram matrix by halves and in bfloat16 against all products in float64."""

from __future__ import annotations

import pytest
import torch

from compresskit.calibration import gram
from compresskit.calibration.gram import add_gram, mirror

PRECISION = torch.backends.mkldnn.matmul


def gram_of(*parts: torch.Tensor) -> torch.Tensor:
    inputs = parts[0].shape[1]
    sums = torch.zeros(inputs, inputs)
    for part in parts:
        add_gram(sums, part)
    mirror(sums)
    return sums


@pytest.mark.parametrize("inputs", [1, 5, 256, 700])
def test_products_of_bfloat16_are_exact(inputs: int) -> None:
    """Whole numbers to 256 and sums below 2**24: float32 holds every step, so nothing at all may be lost."""
    torch.manual_seed(0)
    x = torch.randint(-256, 257, (200, inputs)).bfloat16()
    assert torch.equal(gram_of(x[:90], x[90:]).double(), x.double().t() @ x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_sums_are_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.zeros(1000, 300, dtype=dtype)  # enough for the kernel in question, but nearly all of them zero,
    x[:5] = torch.randn(5, 300) + 0.5  # so that errors of the factors do not average out
    exact = x.double().t() @ x.double()
    error = (gram_of(x) - exact).abs().max() / exact.max()
    assert error < 1e-6, "factors rounded to bfloat16 would be off by a thousandth"


def test_long_inputs_and_wide_ones_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "MAX_TOKENS", 7)
    x = torch.randn(20, 30)
    torch.testing.assert_close(gram_of(x), x.t() @ x, rtol=1e-5, atol=1e-5)


def test_the_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Spy(torch.Tensor):
        def __getitem__(self, at: object) -> torch.Tensor:
            seen.append(PRECISION.fp32_precision)
            raise ValueError("mine")

    before = PRECISION.fp32_precision
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(ValueError, match="mine"):
            add_gram(torch.zeros(3, 3), torch.ones(2, 3, dtype=dtype).as_subclass(Spy))
        assert PRECISION.fp32_precision == before
    assert seen == ["bf16", before]
