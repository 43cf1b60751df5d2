"""Schemes and the texts they are read from."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compresskit.errors import SchemeError
from compresskit.quant.scheme import KNOWN, Scheme, parse


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W8A8", Scheme(weight_bits=8, activation_bits=8)),
        ("w8a16", Scheme(weight_bits=8)),
        ("W4A16", Scheme(weight_bits=4, group_size=128)),
        ("w4a16-G32", Scheme(weight_bits=4, group_size=32)),
        ("w4a16_g64", Scheme(weight_bits=4, group_size=64)),
        (" w4a16-channel ", Scheme(weight_bits=4)),
        ("w8a8-static", Scheme(weight_bits=8, activation_bits=8, static=True)),
        ("W4A16_ASYM", Scheme(weight_bits=4, group_size=128, symmetric=False)),
        ("w8a16-g32", Scheme(weight_bits=8, group_size=32)),
        ("w4a8", Scheme(weight_bits=4, group_size=128, activation_bits=8)),
        ("FP8_DYNAMIC", Scheme(weight_bits=8, number="float", activation_bits=8)),
        ("nf4", Scheme(weight_bits=4, number="nf4", group_size=64)),
    ],
)
def test_texts(text: str, scheme: Scheme) -> None:
    assert parse(text) == scheme


@pytest.mark.parametrize("text", KNOWN)
def test_every_known_scheme_parses_back(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("w8a", "w8a8"),
        ("int4", "w4a16"),
        ("w4a16g32", "w4a16-g32"),
        ("w4a16-g0", "w4a16"),
        ("w8a8-g32", "w8a8"),
        ("w4a8-asym", "w4a8"),
        ("w4a16-static", "w8a8-static"),
        ("", "w8a8"),
    ],
)
def test_unknown_texts_suggest(text: str, near: str) -> None:
    with pytest.raises(SchemeError, match=rf"stages\[1\].scheme: expected a quantisation scheme.*{near}"):
        parse(text, where="stages[1].scheme")


def test_misfit_and_bits() -> None:
    assert parse("w4a16-g32").misfit(172) == "in_features divisible by the group size 32"
    assert parse("w4a16-g32").misfit(64) == ""
    assert parse("w8a8").misfit(43) == ""
    assert parse("w4a16-g128").bits_per_weight(4096, 16) == 4.125
    assert parse("w8a16").bits_per_weight(64, 32) == 8.5
    assert parse("w4a16-g32-asym").bits_per_weight(64, 16) == 4 + 20 / 32
    assert parse("w4a8-g32").bits_per_weight(64, 16) == 8.5, "stored as int8"
    assert parse("nf4").bits_per_weight(64, 16) == 4.5, "one float32 for 64 weights"


def test_no_torch() -> None:
    code = "import sys, compresskit.quant.scheme; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
