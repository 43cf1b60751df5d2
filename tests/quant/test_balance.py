"""What a block's modules hand each other before its layers are quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor

from compresskit.calibration.statistics import STATISTICS, LayerStats
from compresskit.calibration.walk import walk
from compresskit.modeling import StreamedModel, load_model, open_model
from compresskit.quant.balance import Balance, Reader, balance, share
from compresskit.quant.base import Quantized
from compresskit.quant.rtn import RoundToNearest
from compresskit.quant.scheme import Scheme, parse

EVERY = frozenset(STATISTICS)


class AtRandom(RoundToNearest):
    """A method that scales by random factors."""

    needs: ClassVar[frozenset[str]] = EVERY

    def scale(self, readers: Sequence[Reader], channel_I: Tensor) -> Tensor:
        assert all(len(channel_I) == reader.weight_OI.shape[1] for reader in readers)
        assert all(reader.after_norm == (len(readers) > 1) for reader in readers), "a Llama has it so"
        generator = torch.Generator().manual_seed(len(readers))
        return share(torch.rand(len(channel_I), generator=generator) * 3 + 0.3, channel_I)

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats | None = None) -> Quantized:
        raise AssertionError("not called here")


def measure(
    directory: Path, out: Path, layers: Sequence[str], prepare: Balance | None = None
) -> dict[str, LayerStats]:
    """The statistics that each visit of ``layers`` is given; nothing is quantised."""
    found: dict[str, LayerStats] = {}

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        found[layer] = stats
        return weight_OI

    out.mkdir()
    rows = [
        {"input_ids": torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n))}
        for n in (9, 40)
    ]
    with StreamedModel(open_model(directory), out) as streamed:
        walk(streamed, rows, visit, EVERY, layers=layers, prepare=prepare)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def test_scaling_changes_no_logits_and_statistics_follow(model: Path, tmp_path: Path) -> None:
    linears = open_model(model).anatomy.linears
    layers = [name for name in linears if linears[name].block]
    prepare = Balance(AtRandom(), dict.fromkeys(layers, parse("w8a8")))
    told = measure(model, tmp_path / "scaled", layers, prepare)
    assert prepare.scaled == layers or sorted(prepare.scaled) == sorted(layers)
    assert prepare.warnings == ()
    measured = measure(tmp_path / "scaled", tmp_path / "again", layers)
    changed = 0
    for name in layers:
        for need, field in STATISTICS.items():
            expected: Tensor = getattr(measured[name], field)
            got = told[name].require(need, expected.shape[0])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=f"{name} {need}")
        assert told[name].layer == name
        before, after = (open_model(d).weight_OI(name) for d in (model, tmp_path / "scaled"))
        changed += not torch.equal(before, after)
    assert changed == len(layers)
    one, other = told["model.layers.0.self_attn.q_proj"], told["model.layers.0.self_attn.k_proj"]
    assert one.input_gram_II is other.input_gram_II, "layers of one input share one large matrix"
    ids = torch.arange(60)[None]
    logits = [load_model(d)(ids).logits for d in (model, tmp_path / "scaled")]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_scaled_are_told_and_left(model: Path, tmp_path: Path) -> None:
    """Without up_proj nothing may take the inverse of down_proj's scales; without k_proj nothing q_proj's."""
    layers = [
        f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.v", "self_attn.o", "mlp.down")
    ]
    prepare = Balance(AtRandom(), dict.fromkeys(layers, parse("w8a8")))
    measure(model, tmp_path / "out", layers, prepare)
    assert prepare.scaled == ["model.layers.1.self_attn.o_proj"]
    assert prepare.unscaled == tuple(layers[i] for i in (0, 1, 3))
    assert len(prepare.warnings) == 1
    assert prepare.warnings[0].startswith("3 of 4 layers (down_proj, q_proj, v_proj) were quantised without")
    before, after = open_model(model), open_model(tmp_path / "out")
    changed = {name for name in before.names() if not torch.equal(before.tensor(name), after.tensor(name))}
    assert changed == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "vo"}


def test_zeros_stay_zeros(model: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    source = open_model(model)
    layers = [name for name, linear in source.anatomy.linears.items() if linear.block]
    with StreamedModel(source, pruned) as streamed:
        walk(streamed, None, lambda _, weight_OI, stats: weight_OI.where(weight_OI > 0, 0), layers=layers)
    measure(pruned, tmp_path / "out", layers, Balance(AtRandom(), dict.fromkeys(layers, parse("w8a8"))))
    before, after = open_model(pruned), open_model(tmp_path / "out")
    for name in layers:
        assert torch.equal(before.weight_OI(name) == 0, after.weight_OI(name) == 0)
        assert not torch.equal(before.weight_OI(name), after.weight_OI(name))


def test_only_methods_that_scale_prepare() -> None:
    assert balance(RoundToNearest(), {}) is None
    assert isinstance(balance(AtRandom(), {}), Balance)


def test_inputs_of_one_channel_share_one_scale() -> None:
    scale_I = torch.tensor([1.0, 4.0, 2.0, 5.0, 0.25])
    got = share(scale_I, torch.tensor([0, 3, 1, 3, 3]))
    mean = (4 * 5 * 0.25) ** (1 / 3)
    torch.testing.assert_close(got, torch.tensor([1.0, mean, 2.0, mean, mean]))


def test_a_tied_layer_is_in_no_group(tmp_path: Path) -> None:
    """What is shared with another module must not be scaled for the sake of one."""
    directory = tiny_llama(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    source = open_model(directory)
    tied = (("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),)
    object.__setattr__(source, "anatomy", replace(source.anatomy, tied=(*source.anatomy.tied, *tied)))
    layers = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    prepare = Balance(AtRandom(), dict.fromkeys(layers, parse("w8a8")))
    with StreamedModel(source, out) as streamed:
        walk(
            streamed,
            [{"input_ids": torch.arange(9)}],
            lambda name, weight_OI, stats: weight_OI,
            EVERY,
            layers=layers,
            prepare=prepare,
        )
    assert prepare.scaled == []
