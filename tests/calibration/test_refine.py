"""What a component is handed, against hooks on the whole dense model and on the model as changed so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from compresskit.calibration.refine import Component, components, first_of
from compresskit.calibration.statistics import LayerStats
from compresskit.calibration.walk import walk
from compresskit.modeling import StreamedModel, load_model, open_model
from tests.calibration.test_walk import some_rows
from tests.modeling.conftest import Model

NEEDS = frozenset({"input_sq_mean"})


def halved(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
    return weight_OI * 0.5


class Watching:
    """Keeps what it is handed, and makes every weight 0.9 of what it is."""

    passes = 1

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, component: Component) -> Mapping[str, Tensor]:
        pairs = []
        for example in component.examples():
            with torch.no_grad():
                got = first_of(component.module(*example.args, **example.kwargs))
            assert got is not None
            pairs.append((got, example.target))
        self.seen[component.name] = pairs
        return {f"{n}.weight": 0.9 * _weight(component, n) for n in component.layers}


def _weight(component: Component, layer: str) -> Tensor:
    inside = layer.removeprefix(component.name).removeprefix(".")
    return component.module.get_submodule(inside).get_parameter("weight").detach()


def outputs(model: Any, names: list[str], rows: Any) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen[name].append(first_of(out))
        )
    with torch.no_grad():
        for row in rows:
            model(row["input_ids"][None], use_cache=False)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("spill", [False, True])
def test_inputs_are_of_the_changed_model_and_targets_of_the_dense_one(
    family: str, spill: bool, model: Model, tmp_path: Path
) -> None:
    check_components(model(family), tmp_path, spill=spill)


def test_a_component_may_be_called_with_more_than_its_input(tmp_path: Path) -> None:
    """Bloom's feed-forward network is given the residual besides, which is other for each batch."""
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    check_components(tmp_path / "bloom", tmp_path / "work", spill=True)


def check_components(directory: Path, place: Path, *, spill: bool) -> None:
    source = open_model(directory)
    rows = some_rows(24, 24, 16)
    watching = Watching()
    (place / "out").mkdir(parents=True)
    with StreamedModel(source, place / "out") as streamed:
        found = walk(
            streamed, rows, halved, NEEDS, refine=watching, spill=place / "hidden" if spill else None
        )
    assert not any("Not refined" in warning for warning in found.warnings)
    assert sorted(p.name for p in place.iterdir()) == ["out"], "no file is left behind"
    names = list(watching.seen)
    dense = outputs(load_model(source, dtype="float32"), names, rows)
    # The result of the walk, with this component's own layers as they were when it was handed over.
    for name in names:
        changed = load_model(open_model(place / "out"), dtype="float32")
        with torch.no_grad():
            for layer in (n for n in source.anatomy.linears if n == name or n.startswith(f"{name}.")):
                changed.get_parameter(f"{layer}.weight").div_(0.9)
        got = outputs(changed, [name], rows)[name]
        # Batches hold the documents of one length together.
        width = got[0].shape[-1]
        for at, (batch, number, length) in enumerate([(0, 0, 24), (0, 1, 24), (1, 0, 16)]):
            mine, target = (t.reshape(-1, length, width)[number] for t in watching.seen[name][batch])
            torch.testing.assert_close(mine, got[at].reshape(length, width))
            torch.testing.assert_close(target, dense[name][at].reshape(length, width))
    for name, linear in source.anatomy.linears.items():
        if linear.block is not None:
            now = open_model(place / "out").weight_OI(name)
            torch.testing.assert_close(now, source.weight_OI(name) * 0.45)


def test_what_does_not_run_once_is_left_out_and_told(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that runs its feed-forward network twice, as models with shared weights do."""
    monkeypatch.setattr(LlamaDecoderLayer, "forward", _with_mlp_twice)
    source = open_model(model("llama"))
    (tmp_path / "out").mkdir()
    watching = Watching()
    with StreamedModel(source, tmp_path / "out") as streamed:
        found = walk(streamed, some_rows(16), halved, NEEDS, refine=watching)
    assert {name.rpartition(".")[2] for name in watching.seen} == {"self_attn"}
    assert found.warnings[0].startswith("Not refined, since they do not run once in each batch")
    assert f"{source.anatomy.blocks[0]}.mlp" in found.warnings[0]


def test_what_gives_no_tensor_is_left_out_of_a_single_batch_too(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: {"hidden": forward(self, x)})
    monkeypatch.setattr(LlamaDecoderLayer, "forward", _with_mlp_in_a_mapping)
    source = open_model(model("llama"))
    watching = Watching()
    with StreamedModel(source, None) as streamed:
        found = walk(streamed, some_rows(16), halved, NEEDS, refine=watching)
    assert {name.rpartition(".")[2] for name in watching.seen} == {"self_attn"}
    assert found.warnings[0].startswith("Not refined")


def _with_mlp_in_a_mapping(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    hidden, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden = hidden + hidden_states
    return hidden + self.mlp(self.post_attention_layernorm(hidden))["hidden"]  # type: ignore[no-any-return]


def _with_mlp_twice(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    hidden, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden = hidden + hidden_states
    for _ in range(2):
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
    return hidden  # type: ignore[no-any-return]


def test_components_are_the_children_of_a_block() -> None:
    names = ["m.0.attn.q", "m.0.attn.o", "m.0.fc1", "m.0.moe.experts.0.up"]
    assert components("m.0", names) == {
        "m.0.attn": ("m.0.attn.q", "m.0.attn.o"),
        "m.0.fc1": ("m.0.fc1",),
        "m.0.moe": ("m.0.moe.experts.0.up",),
    }
