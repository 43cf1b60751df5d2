"""What a collector makes of layers that do not run as they were said to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compresskit.calibration.collect import Collector, Enough
from compresskit.errors import StatisticError
from compresskit.modeling.anatomy import Linear

NEEDS = frozenset({"input_gram"})


def layers(*names: str) -> list[Linear]:
    form = {"block": None, "transposed": False, "has_bias": True, "tied": False}
    return [Linear(name=name, out_features=4, in_features=4, **form) for name in names]


class Same(nn.Module):
    """Runs a layer, and hands on what it read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer(x)
        return x


def model() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "c")})


def test_a_batch_is_left_when_all_were_fed() -> None:
    """In the first batch all are watched; later one of those that read the same tensor is enough."""
    root, x, other = model(), torch.rand(3, 4), torch.rand(3, 4)
    with Collector(root, layers("a", "b", "c"), NEEDS, torch.device("cpu"), once=True) as collector:
        for values in ((x, x, other), (other, other, x)):
            collector.begin(3, None)
            root["c"](values[2])
            with pytest.raises(Enough):
                nn.Sequential(Same(root["a"]), root["b"])(values[0])
    stats = collector.finish(["a", "b", "c"])
    assert [one.num_tokens for one in stats.values()] == [6, 6, 6]
    assert stats["a"].shared is stats["b"].shared is not stats["c"].shared
    want = torch.cat([x, other])
    torch.testing.assert_close(stats["b"].require("input_gram", 4), want.t() @ want / 6)


def test_a_layer_that_sees_other_tokens_than_it_should_is_told() -> None:
    root = model()
    with Collector(root, layers("a"), NEEDS, torch.device("cpu"), once=True) as collector:
        collector.begin(3, None)
        with pytest.raises(StatisticError, match=r"a: expected one run with every token.*rows of one length"):
            root["a"](torch.rand(2, 4))


@pytest.mark.parametrize(
    "go_on", [lambda c: c.begin(3, None), lambda c: c.finish(["a", "b"])], ids=["next batch", "end"]
)
def test_a_layer_that_did_not_run_is_told(go_on: Callable[[Collector], object]) -> None:
    root = model()
    with Collector(root, layers("a", "b"), NEEDS, torch.device("cpu"), once=True) as collector:
        collector.begin(3, None)
        root["a"](torch.rand(3, 4))
        with pytest.raises(StatisticError, match=r"b: expected one run with every token"):
            go_on(collector)


def test_without_a_word_about_runs_they_may_be_many_or_none() -> None:
    root, x = model(), torch.rand(3, 4)
    with Collector(root, layers("a", "b"), NEEDS, torch.device("cpu")) as collector:
        collector.begin(3, None)
        root["a"](x)
        root["a"](x[:1] * 2)
    stats = collector.finish(["a", "b"])
    assert (stats["a"].num_tokens, stats["b"].num_tokens) == (4, 0)
