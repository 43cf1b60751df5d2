"""Reconstruction against solving for the same weights exactly, and within a real chain of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

from compresskit.calibration.refine import Component, Example
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.sparse.recover.reconstruct import Reconstruct
from compresskit.sparse.stage import Prune
from tests.sparse.test_prune_stage import TEXT, faults, outlook, run


def component_of(
    module: nn.Module, layers: tuple[str, ...], inputs: Tensor, target: Tensor, mask: Tensor | None = None
) -> Component:
    def examples() -> Iterator[Example]:
        for at in range(len(inputs)):
            part = slice(at, at + 1)
            yield Example((inputs[part],), {}, target[part], None if mask is None else mask[part])

    return Component("part", module, layers, examples)


def pruned_linear() -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear layer with half of its weights zeroed, inputs (B, T, I), and what it gave before."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 5)
    mixed = torch.randn(12, 12)
    inputs = torch.randn(8, 16, 12) @ mixed
    with torch.no_grad():
        target = linear(inputs)
        linear.weight[torch.rand(5, 12) < 0.5] = 0
    return linear, inputs, target


def test_a_linear_layer_comes_to_the_least_squares_solution() -> None:
    linear, inputs, target = pruned_linear()
    component = component_of(linear, ("part",), inputs, target)
    got = Reconstruct(epochs=600, learning_rate=0.03).recover(component)
    assert set(got.parameters) == {"part.weight", "part.bias"}
    new, bias = got.parameters["part.weight"], got.parameters["part.bias"]
    assert torch.equal(new == 0, linear.weight == 0)
    x, y = inputs.flatten(0, 1).double(), target.detach().flatten(0, 1).double()
    error = 0.0
    for row in range(5):
        keep = linear.weight[row] != 0
        part = torch.cat([x[:, keep], torch.ones(len(x), 1).double()], 1)
        best = torch.linalg.lstsq(part, y[:, row : row + 1]).solution
        error += float((part @ best - y[:, row : row + 1]).square().sum())
    best_possible = error / float(y.square().sum())
    assert got.before > 2 * best_possible
    assert got.after == pytest.approx(best_possible, rel=0.02)
    made = x @ new.double().t() + bias.double()
    assert float((made - y).square().sum() / y.square().sum()) == pytest.approx(got.after, rel=1e-4)


def test_the_module_is_not_changed_and_no_worse_values_are_returned() -> None:
    linear, inputs, target = pruned_linear()
    former = {name: p.detach().clone() for name, p in linear.named_parameters()}
    Reconstruct(epochs=2).recover(component_of(linear, ("part",), inputs, target))
    assert all(torch.equal(p, former[name]) for name, p in linear.named_parameters())
    perfect = component_of(linear, ("part",), inputs, linear(inputs).detach())
    done = Reconstruct(epochs=2).recover(perfect)
    assert done.parameters == {}
    assert done.before == done.after == 0


def test_only_the_layers_named_are_trained() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6, bias=False))
    inputs = torch.randn(4, 10, 6)
    with torch.no_grad():
        target = module(inputs)
        module[2].weight[:, ::2] = 0  # type: ignore[index]
    done = Reconstruct(epochs=5).recover(component_of(module, ("part.2",), inputs, target))
    assert set(done.parameters) == {"part.2.weight"}
    assert done.after < done.before


def test_padding_does_not_count() -> None:
    linear, inputs, target = pruned_linear()
    mask = torch.ones(8, 16)
    mask[:, 10:] = 0
    spoilt = target.detach().clone()
    spoilt[:, 10:] = 1e3
    clean = component_of(linear, ("part",), inputs[:, :10], target[:, :10].detach())
    padded = component_of(linear, ("part",), inputs, spoilt, mask)
    one, other = (Reconstruct(epochs=3).recover(c) for c in (clean, padded))
    assert one.after == pytest.approx(other.after, rel=1e-4)
    torch.testing.assert_close(one.parameters["part.weight"], other.parameters["part.weight"])


def test_bfloat16_is_trained_in_float32() -> None:
    linear, inputs, target = pruned_linear()
    low = linear.to(torch.bfloat16)
    done = Reconstruct(epochs=20).recover(component_of(low, ("part",), inputs.bfloat16(), target.bfloat16()))
    new = done.parameters["part.weight"]
    assert new.dtype == torch.float32
    assert not torch.equal(new, new.bfloat16().float()), "a checkpoint of float32 is not rounded"
    assert done.after < done.before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Random weights large enough for blocks to matter."""
    place = tmp_path_factory.mktemp("model")
    return open_model(tiny_llama(place, num_hidden_layers=3, initializer_range=0.2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT * 60)
    return path


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_stage_recovers_each_component(method: str, model: ModelSource, text: Path, tmp_path: Path) -> None:
    plain = Prune(method, pattern="2:4", samples=4, context_length=64)
    stage = replace(plain, recover={"method": "reconstruct", "epochs": 80})
    assert stage.faults(outlook(model), "s") == []
    assert stage.forecast(outlook(model)).memory_bytes > plain.forecast(outlook(model)).memory_bytes
    _, without = run(plain, model, tmp_path / "plain", text)
    result, pruned = run(stage, model, tmp_path / "recovered", text)
    assert all(promise.broken(pruned, pruned) == () for promise in result.promises)
    recovered = result.metrics["recovered"]
    assert list(recovered) == [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
    assert all(found["error_after"] < found["error_before"] for found in recovered.values())
    assert all("before recovery" in record.note for record in result.layers)
    assert {record.relative_error for record in result.layers} == {None}, "it was of other weights"
    ids = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        want, far, near = (
            load_model(m, dtype="float32")(ids).logits.log_softmax(-1) for m in (model, without, pruned)
        )
    lost = [float((want.exp() * (want - got)).sum(-1).mean()) for got in (far, near)]
    assert lost[1] < 0.95 * lost[0]


def test_a_grid_keeps_weights_from_being_retrained(model: ModelSource) -> None:
    gridded = replace(outlook(model), layer_schemes={"model.layers.0.mlp.up_proj": ("w8a16",)})
    (fault,) = Prune(recover="reconstruct").faults(gridded, "stages[0]")
    assert str(fault).startswith("stages[0].recover: expected layers without a grid")
    assert "model.layers.0.mlp.up_proj" in str(fault)
    assert Prune().faults(gridded, "stages[0]") == []
    assert "Did you mean: reconstruct?" in faults(Prune(recover="recontsruct"), model)
    said = faults(Prune(recover={"method": "reconstruct", "epochs": 0}), model)
    assert "stages[0].recover.epochs: expected a number at least 1" in said
