"""Steps of blocks that no model family here has, and what stands in for a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresskit.calibration.chain import Plan, Step, build_of, find_steps
from compresskit.calibration.replay import Replay, Replays
from compresskit.errors import StatisticError

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


def plan_of(block: nn.Module, *chosen: str) -> Plan:
    root = nn.ModuleDict({"block": block})
    linears = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    names = [f"block.{name}" for name in chosen] or linears
    inputs = torch.rand(2, 1, TOKENS, WIDTH)
    with torch.no_grad():
        return find_steps(root, "block", linears, names, lambda number: block(inputs[number]), TOKENS)


def steps_of(block: nn.Module, *chosen: str) -> tuple[Step, ...]:
    return plan_of(block, *chosen).steps


def layers_of(steps: tuple[Step, ...]) -> list[tuple[str, ...]]:
    return [tuple(name.removeprefix("block.") for name in step.layers) for step in steps]


def test_the_last_layer_of_a_module_stands_for_it() -> None:
    steps = steps_of(Block(one=Part("a", "b"), two=Part("a", "b")))
    assert layers_of(steps) == [("one.a",), ("one.b",), ("two.a",), ("two.b",)]
    assert steps[1].keeps == (Replay("block.one", "block.one.b", applies_layer=True, extras=None),)
    assert steps[0].keeps == steps[2].keeps == ()
    assert all(step.once for step in steps)


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


class Leaves(Part):
    """Leaves something behind that ``Takes`` uses."""

    def forward(self, x: Tensor) -> Any:
        self.left = x.mean(-1, keepdim=True)
        return super().forward(x)


class Takes(Part):
    def __init__(self, leaves: Leaves, *names: str) -> None:
        super().__init__(*names)
        object.__setattr__(self, "leaves", leaves)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.leaves.left)


def test_modules_that_hand_each_other_more_than_they_return_are_one_step() -> None:
    leaves = Leaves("a", "b")
    plan = plan_of(Block(one=leaves, two=Takes(leaves, "a", "b")))
    assert len(plan.steps) == 1
    assert "more than what they return" in plan.reason


def test_a_module_with_layers_that_run_after_its_result_is_made_runs() -> None:
    """A layer that nothing reads runs last: a replay of its module would never show what it is fed."""

    class Aside(Part):
        def forward(self, x: Tensor) -> Tensor:
            first, second, aside = self.children()
            result = second(first(x).tanh())
            aside(result)
            return result

    steps = steps_of(Block(one=Aside("a", "b", "aside"), two=Part("a", "b")))
    fed = [name for step in steps for name in step.layers]
    assert "block.one.aside" in fed
    assert all(replay.layer != "block.one.b" for step in steps for replay in step.keeps)


def test_what_a_later_replay_replaces_is_forgotten(tmp_path: Path) -> None:
    """The result of a module is read by a layer behind it, so that two replays name the module."""

    class Direct(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(self.one(x))

    block = Direct(one=Part("a", "b"), two=Part("c", "d"))
    plan = plan_of(block)
    assert layers_of(plan.steps) == [("one.a",), ("one.b",), ("two.c",), ("two.d",)]
    keeps = [replay for step in plan.steps for replay in step.keeps]
    assert [(replay.module, replay.applies_layer) for replay in keeps] == [
        ("block.one", True),
        ("block.one", False),
        ("block.two", True),
    ]
    replays = Replays(nn.ModuleDict({"block": block}), tmp_path / "spill", torch.device("cpu"))
    x = torch.rand(1, TOKENS, WIDTH)
    with torch.no_grad():
        truth = block(x)
        for _ in range(2):
            for keep in keeps:
                with replays.during(0, TOKENS, [keep]):
                    block(x)
            with replays.during(0, TOKENS, is_last=True):
                assert torch.equal(block(x), truth)
            assert len(list(tmp_path.iterdir())) == 2, "of three places one was free again"
            replays.clear()
    replays.close()


def test_tensors_that_change_in_place_are_others() -> None:
    class Between(Block):
        def forward(self, x: Tensor) -> Tensor:
            one, two = self.children()
            y = one(x)
            return x + two(y.mul_(2)) + two.b(y)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = x + 0
            first = self.a(y)
            return first + self.b(y.mul_(2))

    assert layers_of(steps_of(Shared())) == [("a",), ("b",)]
    plan = plan_of(Between(one=Part("a", "b"), two=Part("a", "b")))
    assert all(replay.applies_layer for step in plan.steps for replay in step.keeps)


def test_blocks_of_one_build_take_the_same_steps() -> None:
    one, other = Block(one=Part("a", "b")), Block(one=Part("a", "b"))
    form = one.one.form
    other.one.form = form
    assert build_of(one) == build_of(other)
    other.layer_idx = 3
    assert build_of(one) == build_of(other), "where it is does not matter"
    other.window = 3
    assert build_of(one) != build_of(other)
    assert build_of(one) != build_of(Block(one=Part("a", "c")))
    assert Step(("block.a",), (Replay("block", "block.a", True, None),), True).moved("block", "b.2") == Step(
        ("b.2.a",), (Replay("b.2", "b.2.a", True, None),), True
    )


def test_a_kept_layer_that_runs_otherwise_is_told() -> None:
    block = Block(one=Part("a", "b"))
    replay = Replay("block.one", "block.one.b", applies_layer=True, extras=None)
    replays = Replays(nn.ModuleDict({"block": block}), None, torch.device("cpu"))
    x = torch.rand(1, TOKENS, WIDTH)

    def run(tokens: int, times: int) -> None:
        with torch.no_grad(), replays.during(0, tokens, [replay]):
            for _ in range(times):
                block(x)

    with pytest.raises(StatisticError, match=r"block\.one\.b.*one run with every token"):
        run(TOKENS + 1, 1)
    with pytest.raises(StatisticError, match=r"rows of one length"):
        run(TOKENS, 2)
    assert not block.one.b._forward_pre_hooks


@pytest.mark.parametrize("in_a_file", [False, True])
def test_stand_ins_give_what_the_module_would(in_a_file: bool, tmp_path: Path) -> None:
    """Also of a layer that was changed since, of other batches, and after a block that works in place."""
    block = Block(one=Part("a", "b", form=lambda y: (y, None)), two=Part("a", "b"))
    root = nn.ModuleDict({"block": block})
    replay = Replay("block.one", "block.one.b", applies_layer=True, extras=1)
    replays = Replays(root, tmp_path / "spill" if in_a_file else None, torch.device("cpu"))
    inputs = [torch.rand(1, tokens, WIDTH) for tokens in (3, 2)]
    with torch.no_grad():
        for batch, x in enumerate(inputs):
            with replays.during(batch, x.shape[1], [replay]):
                block.one(x)
        block.one.b.weight.mul_(2)
        truth = [block.one(x)[0] for x in inputs]
        block.one.a.weight.zero_()  # what the module would make now is not what is asked for
        for last in (False, False, True):
            for batch, x in enumerate(inputs):
                with replays.during(batch, x.shape[1], is_last=last):
                    result, rest = block.one(x)
                assert rest is None
                assert torch.equal(result, truth[batch])
                result.zero_()
    with pytest.raises(ValueError, match="mine"), replays.during(0, 3):
        raise ValueError("mine")
    assert "forward" not in vars(block.one)
    replays.close()
    assert list(tmp_path.iterdir()) == []
