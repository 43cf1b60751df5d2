"""Which layer gets which scheme, and what no checkpoint can hold together."""

from __future__ import annotations

import pytest
from tiny import tiny_llama

from compresskit.errors import InputError, SchemeError
from compresskit.modeling import open_model
from compresskit.modeling.anatomy import Anatomy
from compresskit.quant.assignment import assign, freeze_overrides, mixture_faults
from compresskit.quant.scheme import parse


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return open_model(tiny_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)).anatomy


def given(anatomy: Anatomy, overrides: object, **fields: tuple[str, ...]) -> dict[str, str]:
    plain = {"targets": ("Linear",), "ignore": ("lm_head",)} | fields
    frozen = freeze_overrides(overrides)  # type: ignore[arg-type]
    made = assign(anatomy, parse("w4a16-g32"), plain["targets"], plain["ignore"], frozen, where="stages[0]")
    return {layer: str(scheme) for layer, scheme in made.items()}


def test_the_first_override_that_matches_counts(anatomy: Anatomy) -> None:
    made = given(anatomy, {"layers.0.mlp.down_proj": "none", "*.down_proj": "w8a16", "re:.*": "w4a16-g16"})
    assert "model.layers.0.mlp.down_proj" not in made
    assert made["model.layers.1.mlp.down_proj"] == "w8a16"
    assert {made[n] for n in made if "down" not in n} == {"w4a16-g16"}
    assert list(made) == [n for n in anatomy.linears if n in made], "in the model's order"


def test_the_head_may_be_spared_twice_and_quantised_when_it_is_let_in(anatomy: Anatomy) -> None:
    assert "lm_head" not in given(anatomy, {"lm_head": "none"})
    assert given(anatomy, {"lm_head": "w8a16"}, ignore=())["lm_head"] == "w8a16"
    with pytest.raises(
        InputError, match=r"overrides.lm_head: expected a pattern that matches a layer to quan"
    ):
        given(anatomy, {"lm_head": "w8a16"})


def test_every_fault_is_told_together(anatomy: Anatomy) -> None:
    with pytest.raises(InputError) as told:
        given(anatomy, {"*.up_prj": "w8a16", "*.up_proj": "w9a16"})
    assert "stages[0].overrides.*.up_prj: expected a pattern that matches" in str(told.value)
    assert "stages[0].overrides.*.up_proj: expected a quantisation scheme, got 'w9a16'" in str(told.value)
    with pytest.raises(InputError, match="expected a layer left to quantise, got none"):
        given(anatomy, {"*": "none"})


def test_forms_of_overrides() -> None:
    want = (("*.a", "w8a16"), ("b", "none"))
    assert freeze_overrides({"*.a": "w8a16", "b": None}) == want
    assert freeze_overrides(["*.a=w8a16", "b=none"]) == want
    assert freeze_overrides(want) == want
    with pytest.raises(SchemeError, match="overrides: expected PATTERN=SCHEME, got 'w8a16'"):
        freeze_overrides("w8a16")


def test_mixtures() -> None:
    def said(*schemes: str) -> str:
        return " ".join(map(str, mixture_faults(map(parse, schemes), "stages[0]")))

    assert said("w8a8", "w4a16-g32", "fp8") == ""
    assert said("nf4", "nf4") == said("w4a16-asym", "w4a16-asym") == ""
    assert "bitsandbytes holds no others, got nf4, w8a8" in said("w8a8", "nf4")
    assert "zero points holds no others" in said("w4a16-g32-asym", "w4a16-g32")
