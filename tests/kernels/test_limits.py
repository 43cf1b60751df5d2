"""Bytes and limits against values worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compresskit.exports import EXPORTS, runtimes_of
from compresskit.kernels.limits import (
    BF16,
    FP32,
    INT4_G128,
    INT8,
    PACKED_BY,
    READ_INTEGERS,
    Values,
    ZeroLayout,
    gain_on,
    limit,
    packing_on,
    packings,
    values_of,
)

HALF = ZeroLayout(zero_fraction=0.5)
TWO_OF_FOUR = ZeroLayout(zero_fraction=0.5, group=(2, 4))


def bytes_of(values: Values, zeros: ZeroLayout) -> dict[str, float]:
    return {p.storage: p.bytes_per_weight for p in packings(values, zeros)}


# Of 128 weights: bytes of the values, of places and of scales, over 128.
@pytest.mark.parametrize(
    ("values", "zeros", "storage", "expected"),
    [
        (BF16, HALF, "mask", (64 * 2 + 16) / 128),
        (BF16, HALF, "dense", 2.0),
        (FP32, HALF, "mask", (64 * 4 + 16) / 128),
        (INT8, HALF, "mask", (64 + 16) / 128),
        (INT4_G128, HALF, "mask", (32 + 16 + 2) / 128),
        (INT4_G128, HALF, "dense", (64 + 2) / 128),
        (BF16, TWO_OF_FOUR, "index", (64 * 2 + 64 * 2 / 8) / 128),
        (INT4_G128, TWO_OF_FOUR, "index", (32 + 16 + 2) / 128),
        (BF16, ZeroLayout(zero_fraction=0.5, group=(8, 16)), "mask", 1.125),
        (BF16, ZeroLayout(zero_fraction=0.5, group=(8, 16)), "index", (64 * 2 + 64 * 4 / 8) / 128),
        (BF16, ZeroLayout(zero_fraction=0.75, group=(1, 4)), "index", (32 * 2 + 32 * 2 / 8) / 128),
        (BF16, ZeroLayout(zero_fraction=2 / 3, group=(1, 3)), "index", 18 / 3 / 8),
        (
            BF16,
            ZeroLayout(zero_fraction=0.5, block=(4, 4), block_fraction=0.5),
            "block",
            (64 * 2 + 1) / 128,
        ),
        (BF16, ZeroLayout(zero_fraction=0.6), "mask", 0.925),
    ],
)
def test_bytes(values: Values, zeros: ZeroLayout, storage: str, expected: float) -> None:
    assert bytes_of(values, zeros)[storage] == pytest.approx(expected, rel=1e-12)


# Of the limits known for such kernels: dense bf16 over the packed bytes.
@pytest.mark.parametrize(
    ("values", "zeros", "times"),
    [
        (BF16, HALF, 1.78),
        (BF16, ZeroLayout(zero_fraction=0.6), 2.16),
        (BF16, ZeroLayout(zero_fraction=0.7), 2.76),
        (BF16, ZeroLayout(zero_fraction=0.8), 3.89),
        (BF16, ZeroLayout(zero_fraction=0.9), 6.52),
        (BF16, TWO_OF_FOUR, 1.78),
        (INT8, HALF, 3.2),
        (INT8, TWO_OF_FOUR, 3.2),
        (INT4_G128, HALF, 5.12),
        (INT4_G128, TWO_OF_FOUR, 5.12),
        (INT8, ZeroLayout(zero_fraction=0.0), 2.0),
        (INT4_G128, ZeroLayout(zero_fraction=0.0), 3.88),
    ],
)
def test_the_limit_over_dense_bf16(values: Values, zeros: ZeroLayout, times: float) -> None:
    assert limit(BF16, packings(values, zeros)[0]) == pytest.approx(times, abs=0.005)


def test_gaps_are_counted_as_they_are_written() -> None:
    """A kept weight after g zeros stores g mod 16, and one zero for each 16 of them."""
    import random

    draw = random.Random(0)
    for fraction in (0.5, 0.8, 0.95):
        stored = run = 0
        for _ in range(200_000):
            if draw.random() < fraction:
                run += 1
                continue
            stored += 1 + run // 16
            run = 0
        told = bytes_of(BF16, ZeroLayout(zero_fraction=fraction))["gap"]
        assert stored * 20 / 8 / 200_000 == pytest.approx(told, rel=0.02)


def test_the_fewest_bytes_come_first_and_dense_is_always_there() -> None:
    few = packings(BF16, ZeroLayout(zero_fraction=0.05))
    assert few[0].storage == "dense", "zeros that do not pay for their places"
    for zeros in (HALF, TWO_OF_FOUR, ZeroLayout(zero_fraction=1.0), ZeroLayout(zero_fraction=0.9)):
        made = [p.bytes_per_weight for p in packings(BF16, zeros)]
        assert made == sorted(made)
        assert min(made) > 0
        assert "dense" in bytes_of(BF16, zeros)
    assert packings(BF16, TWO_OF_FOUR)[0].storage == "index", "as hardware reads it, where as short"


def test_bits_fall_into_values_and_scales() -> None:
    assert values_of(32) == FP32
    assert values_of(16) == BF16
    assert values_of(8 + 16 / 64) == Values(8, 0.25)
    assert values_of(4.125) == INT4_G128
    assert values_of(6.0) == Values(4, 2.0), "one scale of 32 bits for 16 weights"
    assert str(values_of(4.125)) == "4-bit"


def test_every_runtime_that_an_export_is_for_is_known_and_only_ours_gains_anything() -> None:
    assert set(runtimes_of(EXPORTS)) == set(PACKED_BY)
    assert set(READ_INTEGERS) <= set(PACKED_BY)
    assert runtimes_of(()) == ("transformers", "vLLM")
    assert runtimes_of(["gguf", "onnx", "gguf"]) == ("llama.cpp", "onnxruntime")
    for runtime in set(PACKED_BY) - {"compresskit"}:
        for zeros in (HALF, TWO_OF_FOUR, ZeroLayout(zero_fraction=0.9)):
            assert gain_on(runtime, BF16, zeros) == 1.0
    assert gain_on("compresskit", BF16, TWO_OF_FOUR) == gain_on("compresskit", BF16, HALF) == 16 / 9
    assert packing_on("compresskit", BF16, ZeroLayout(zero_fraction=0.05)).storage == "dense"


def test_a_runtime_gains_by_what_it_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.kernels.limits.PACKED_BY", {"ours": ("mask",)})
    assert gain_on("ours", BF16, HALF) == pytest.approx(16 / 9)
    assert gain_on("ours", BF16, ZeroLayout(zero_fraction=0.9)) == pytest.approx(16 / 2.6), "not by gaps"
    assert gain_on("theirs", BF16, HALF) == 1.0


def test_it_imports_no_torch() -> None:
    code = "import sys, compresskit.kernels.limits; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
