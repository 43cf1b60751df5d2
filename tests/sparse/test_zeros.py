"""The promise of zeros: group by group, and every zero stays dead."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.sparse.promise import Zeros
from compresskit.stage import promise_from_json, promise_to_json


class Held:
    """Weights in memory."""

    def __init__(self, **layers: Tensor) -> None:
        self.layers = layers

    def __contains__(self, name: object) -> bool:
        return str(name).removesuffix(".weight") in self.layers

    def tensor(self, name: str) -> Tensor:
        return self.layers[name.removesuffix(".weight")]

    def weight_OI(self, layer: str) -> Tensor:
        return self.layers[layer]

    def grid(self, layer: str) -> None:
        return None


def half(rows: int = 2) -> Tensor:
    return torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0]] * rows)


def test_kept() -> None:
    made = Held(a=half())
    assert Zeros(layer="a", pattern="2:4").broken(made, made) == ()
    moved = half() * 7
    moved[0, 0] = 0
    assert Zeros(layer="a", pattern="2:4").broken(made, Held(a=moved)) == (), "weights that stay may move"


def test_a_group_with_too_few_zeros_is_named() -> None:
    now = half()
    now[1, 4] = 0.5
    assert Zeros(layer="a", pattern="2:4").broken(Held(a=half()), Held(a=now)) == (
        "row 1, group 1: 1 zero of 2",
        "row 1, input 4: was zero, is 0.5",
    )


def test_a_zero_may_not_move_within_its_group() -> None:
    now = half()
    now[0, 1], now[0, 0] = 9.0, 0.0  # still two zeros of four
    assert Zeros(layer="a", pattern="2:4").broken(Held(a=half()), Held(a=now)) == (
        "row 0, input 1: was zero, is 9",
    )


def test_at_most_ten_sentences() -> None:
    said = Zeros(layer="a", pattern="50%").broken(Held(a=half(8)), Held(a=torch.ones(8, 8)))
    assert len(said) == 10
    assert said[0] == "row 0: 0 zeros of 4"
    assert "more" in said[-1]
    assert len(Zeros(layer="a", pattern="2:4").broken(Held(a=half(8)), Held(a=torch.ones(8, 8)))) == 10


def test_gone_or_reshaped() -> None:
    promise = Zeros(layer="a", pattern="2:4")
    assert promise.broken(Held(a=half()), Held(b=half())) == ("a is gone",)
    assert promise.broken(Held(a=half()), Held(a=half(3))) == ("shape (3, 8), was (2, 8)",)


def test_blocks_and_short_groups() -> None:
    made, now = torch.ones(4, 6), torch.ones(4, 6)
    made[:2, 3:] = made[2:, :3] = 0
    promise = Zeros(layer="a", pattern="50%:2x3")
    assert promise.broken(Held(a=made), Held(a=made)) == ()
    now[:2, 3:] = now[2:, :3] = 0
    now[3, 1] = 5.0
    assert promise.broken(Held(a=made), Held(a=now)) == (
        "block at row 2, input 0: 5 zeros of 6",
        "row 3, input 1: was zero, is 5",
    )
    short = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])  # of the last three one, of four two
    assert Zeros(layer="a", pattern="2:4:pad").broken(Held(a=short), Held(a=short)) == ()
    woken = short.clone()
    woken[0, 4] = 2.0
    assert Zeros(layer="a", pattern="2:4:pad").broken(Held(a=short), Held(a=woken)) == (
        "row 0, group 1: 0 zeros of 1",
        "row 0, input 4: was zero, is 2",
    )


def test_json() -> None:
    promise = Zeros(layer="a", pattern="50%:layer")
    assert promise_from_json(promise_to_json(promise)) == promise
    assert promise_to_json(promise) == {"kind": "zeros", "layer": "a", "pattern": "50%:layer"}
