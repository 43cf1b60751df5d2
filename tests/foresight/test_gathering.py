"""Which weights are whole under ZeRO-3, against what must be by the limits alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compresskit.foresight.gathering import Visit, most_gathered, visits_of
from compresskit.foresight.states import Engine
from compresskit.modeling.anatomy import anatomy_of

EMBEDDING, LINEAR, INNER, BLOCKS = 96 * 64, 64 * 64, 64 * 176, 3
NONE = Engine("zero3", 2)


def visits(*, tied: bool, again: bool = False, whole: int = 64) -> tuple[Visit, ...]:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    anatomy = anatomy_of(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return visits_of(anatomy, shapes, [again] * BLOCKS, whole)


@pytest.mark.parametrize("tied", [False, True])
def test_without_limits_all_weights_stay(tied: bool) -> None:
    most = most_gathered(visits(tied=tied), replace(NONE, live=10**9, reuse=10**9, prefetch=10**9))
    total = EMBEDDING * (2 - tied) + BLOCKS * (4 * LINEAR + 3 * INNER)
    # All but the embedding are fetched ahead together: for a moment there is a copy of them.
    assert most["begin"] == total
    assert most["forward"] == pytest.approx(2 * total, abs=2 * EMBEDDING)
    assert most["backward"] <= total


def test_with_no_room_there_is_one_module_at_a_time() -> None:
    most = most_gathered(visits(tied=False), NONE)
    assert most == {
        "begin": EMBEDDING,
        "forward": INNER,
        "loss": EMBEDDING,
        "loss back": EMBEDDING,
        "backward": INNER,
        "end": EMBEDDING,
    }


def test_what_is_needed_again_soon_stays() -> None:
    """A block that is computed again needs its last layers again before two others are through."""
    near = replace(NONE, reuse=2 * INNER + 1)
    plain, again = (most_gathered(visits(tied=False, again=a), near) for a in (False, True))
    assert plain["forward"] == again["forward"] == INNER
    assert again["backward"] >= 2 * INNER
    assert plain["backward"] == INNER


def test_small_weights_are_never_divided() -> None:
    assert all(count > LINEAR for visit in visits(tied=False, whole=LINEAR) for _, count in visit.weights)
