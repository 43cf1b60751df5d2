"""Which layers a pattern names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compresskit.errors import InputError
from compresskit.targets import matches, select

LAYERS = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]


def anatomy() -> Any:
    return SimpleNamespace(linears=dict.fromkeys([*LAYERS, "lm_head"]), head="lm_head")


@pytest.mark.parametrize(
    ("pattern", "layer", "hit"),
    [
        ("Linear", "anything", True),
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("down_proj", "model.layers.0.mlp.updown_proj", False),
        ("re:.*layers\\.[01]\\.", "model.layers.1.mlp.down_proj", True),
        ("re:.*layers\\.[01]\\.", "model.layers.2.mlp.down_proj", False),
    ],
)
def test_matches(pattern: str, layer: str, hit: bool) -> None:
    assert matches(pattern, layer) is hit


def test_the_head_is_left_alone_unless_asked_for_and_order_is_the_models() -> None:
    assert select(anatomy()) == tuple(LAYERS)
    assert select(anatomy(), ignore=())[-1] == "lm_head"
    assert select(anatomy(), ["re:.*2.*", "*.0.*"], ["q_proj"]) == (LAYERS[1], LAYERS[5])


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_near_layers(field: str) -> None:
    with pytest.raises(InputError, match=rf"stages\[0\]\.{field}.*'\*\.down_prj'.*down_proj"):
        select(anatomy(), **{field: ["*.down_prj"]}, where="stages[0]")


def test_ignoring_everything_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one linear layer"):
        select(anatomy(), ignore=["Linear"])


def test_a_broken_regular_expression_is_an_error() -> None:
    with pytest.raises(InputError, match="regular expression"):
        select(anatomy(), targets=["re:(", "nothing"])
