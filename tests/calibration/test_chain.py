"""Steps of blocks that no model family here has, and what stands in for a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresskit.calibration.chain import Replay, Replays, Step, find_steps

WIDTH, TOKENS = 4, 3


class Part(nn.Module):
    """Layers ``names`` one after another, then what ``form`` makes of the result."""

    def __init__(self, *names: str, form: Any = lambda y: y) -> None:
        super().__init__()
        self.form = form
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Any:
        first, *rest = self.children()
        x = first(x)
        for layer in rest:
            x = layer(x.tanh())
        return self.form(x)


class Block(nn.Module):
    """Parts one after another; where one returns several things the first counts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            result = part(x)
            x = x + (result if isinstance(result, Tensor) else result[0])
        return x


def steps_of(block: nn.Module, *chosen: str) -> tuple[Step, ...]:
    root = nn.ModuleDict({"block": block})
    linears = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    names = [f"block.{name}" for name in chosen] or linears
    probe = lambda: block(torch.rand(1, TOKENS, WIDTH))  # noqa: E731
    with torch.no_grad():
        return find_steps(root, "block", linears, names, probe, TOKENS)


def layers_of(steps: tuple[Step, ...]) -> list[tuple[str, ...]]:
    return [tuple(name.removeprefix("block.") for name in step.layers) for step in steps]


def test_the_last_layer_of_a_module_stands_for_it() -> None:
    steps = steps_of(Block(one=Part("a", "b"), two=Part("a", "b")))
    assert layers_of(steps) == [("one.a",), ("one.b",), ("two.a",), ("two.b",)]
    assert steps[1].keeps == (Replay("block.one", "block.one.b", applied=True, extras=None),)
    assert steps[0].keeps == steps[2].keeps == ()
    assert all(step.once and step.watched == step.layers for step in steps)


@pytest.mark.parametrize(("form", "extras"), [(lambda y: (y,), 0), (lambda y: (y, None), 1)])
def test_the_form_of_a_result_is_kept(form: Any, extras: int) -> None:
    steps = steps_of(Block(one=Part("a", "b", form=form), two=Part("a", "b")))
    assert [replay.extras for step in steps for replay in step.keeps] == [extras, None]


@pytest.mark.parametrize("form", [lambda y: (y, y), lambda y: y * 2, lambda y: y.mul_(2), lambda y: [y]])
def test_a_result_that_is_more_than_the_layer_made_is_not_stood_in_for(form: Any) -> None:
    steps = steps_of(Block(one=Part("a", "b", form=form), two=Part("a", "b")))
    assert len(steps) == 1, "the first layer would run three times"


def test_layers_that_feed_each_other_in_turn_are_one_step() -> None:
    chain = steps_of(Block(one=Part("a", "b", "c", "d")))
    assert layers_of(chain) == [("one.a", "one.b", "one.c", "one.d")]
    assert chain[0].once, "it can be left once the last was fed"
    assert layers_of(steps_of(Block(one=Part("a", "b", "c")))) == [("one.a",), ("one.b",), ("one.c",)]


def test_layers_left_out_are_stood_in_for_too() -> None:
    steps = steps_of(Block(one=Part("a", "b"), two=Part("a", "b")), "one.a", "two.a", "two.b")
    assert layers_of(steps) == [("one.a",), ("two.a",), ("two.b",)]
    assert [replay.module for replay in steps[1].keeps] == ["block.one"]


def test_a_layer_that_sees_some_tokens_only_keeps_its_block_in_one_step() -> None:
    class Expert(Part):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x[:, :1]), x[:, 1:]], 1)

    steps = steps_of(Block(one=Part("a", "b"), two=Expert("a", "b")))
    assert len(steps) == 1
    assert not steps[0].once


def test_a_layer_that_runs_twice_keeps_its_block_in_one_step() -> None:
    class Twice(Part):
        def forward(self, x: Tensor) -> Any:
            return super().forward(super().forward(x))

    steps = steps_of(Block(one=Part("a", "b"), two=Twice("a", "b")))
    assert len(steps) == 1
    assert not steps[0].once


@pytest.mark.parametrize("in_a_file", [False, True])
def test_stand_ins_give_what_the_module_would(in_a_file: bool, tmp_path: Path) -> None:
    """Also of a layer that was changed since, of other batches, and after a block that works in place."""
    block = Block(one=Part("a", "b", form=lambda y: (y, None)), two=Part("a", "b"))
    root = nn.ModuleDict({"block": block})
    replay = Replay("block.one", "block.one.b", applied=True, extras=1)
    replays = Replays(root, tmp_path / "spill" if in_a_file else None, torch.device("cpu"))
    inputs = [torch.rand(1, tokens, WIDTH) for tokens in (3, 2)]
    with torch.no_grad():
        for batch, x in enumerate(inputs):
            with replays.keeping([replay], batch):
                block.one(x)
        block.one.b.weight.mul_(2)
        truth = [block.one(x)[0] for x in inputs]
        block.one.a.weight.zero_()  # what the module would make now is not what is asked for
        for last in (False, False, True):
            for batch, x in enumerate(inputs):
                with replays.standing_in(batch, last=last):
                    result, rest = block.one(x)
                assert rest is None
                assert torch.equal(result, truth[batch])
                result.zero_()
    assert "forward" not in vars(block.one)
    replays.close()
    assert list(tmp_path.iterdir()) == []
