"""The promise of a grid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from compresskit.formats.grid import Grid
from compresskit.quant.promise import OnGrid
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import parse
from compresskit.stage import promise_from_json, promise_to_json

PROMISE = OnGrid(layer="a", scheme="w4a16-g32")


@dataclass
class Held:
    weights: dict[str, Tensor]
    grids: dict[str, Grid] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return str(name).removesuffix(".weight") in self.weights

    def tensor(self, name: str) -> Tensor:
        return self.weights[name.removesuffix(".weight")]

    def weight_OI(self, layer: str) -> Tensor:
        return self.weights[layer]

    def grid(self, layer: str) -> Grid | None:
        return self.grids.get(layer)


def made() -> Held:
    torch.manual_seed(0)
    done = RoundToNearest().quantize(torch.randn(4, 64), parse("w4a16-g32"))
    return Held({"a": done.weight_OI}, {"a": done.grid})


def test_kept_by_the_same_and_by_more_zeros() -> None:
    then = made()
    pruned = then.weights["a"].clone()
    pruned[:, ::2] = 0
    assert PROMISE.broken(then, then) == ()
    assert PROMISE.broken(then, Held({"a": pruned}, then.grids)) == ()


def test_a_weight_between_two_steps_is_named() -> None:
    then, now = made(), made()
    now.weights["a"][2, 40:42] *= 1.01
    assert PROMISE.broken(then, now) == ("row 2, group 1: 2 of 32 weights off the grid",)
    assert len(PROMISE.broken(then, Held({"a": torch.rand(40, 64)}, then.grids))) == 1, "another shape"
    far = Held({"a": torch.rand(4, 64) + 9}, then.grids)
    assert len(PROMISE.broken(then, far)) == 8


def test_a_grid_may_not_change_or_go() -> None:
    then, now = made(), made()
    scale = now.grids["a"].scale_OG * 2
    now.grids["a"] = Grid(bits=4, scale_OG=scale, group_size=32)
    assert PROMISE.broken(then, now) == ("the grid is not the one that was made",)
    assert PROMISE.broken(then, Held(then.weights)) == ("the grid is gone",)
    assert PROMISE.broken(then, Held({})) == ("a is gone",)
    half = Held({"a": then.weights["a"].half()}, then.grids)
    assert "torch.float16" in PROMISE.broken(then, half)[0]


def test_json() -> None:
    assert promise_from_json(promise_to_json(PROMISE)) == PROMISE


@pytest.mark.parametrize("other", ["w4a16-g64", "w4a16-g32-asym", "w4a8-g32", "w8a16", "fp8", "nf4", "w8a8"])
def test_a_grid_of_another_form_breaks_it(other: str) -> None:
    done = RoundToNearest().quantize(made().weights["a"], parse(other))
    held = Held({"a": done.weight_OI}, {"a": done.grid})
    assert PROMISE.broken(held, held) == (f"the grid is one of {parse(other)}, not of w4a16-g32",)
    assert OnGrid("a", other).broken(held, held) == ()


def test_a_scale_of_inputs_must_be_fixed_where_it_is_promised() -> None:
    done = RoundToNearest().quantize(made().weights["a"], parse("w8a8"))
    fixed = Held({"a": done.weight_OI}, {"a": replace(done.grid, activation_scale=torch.ones(1))})
    assert OnGrid("a", "w8a8-static").broken(fixed, fixed) == ()
    assert OnGrid("a", "w8a8").broken(fixed, fixed) == ("the grid is one of w8a8-static, not of w8a8",)
