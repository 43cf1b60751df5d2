"""torchao's tensors as plain transformers loads them, against ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import compresskit as ck
from compresskit.errors import FormatError
from compresskit.modeling import ModelSource, load_model, open_model
from tests.exports.models import TOKENS, as_users_see_it, on_grids, packed, rounding
from tests.tiny import tiny_llama

WEIGHTS_ONLY = 1e-6  # float32 in another order
ROUNDED_INPUTS = 0.01  # of logits up to 0.7: a token's largest input, if negative, lies between two integers,
# -127.5, and goes to one by multiplication with the inverse scale and to the other by division

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("torchao") / "model"
    return open_model(tiny_llama(place, hidden_size=64, tie_word_embeddings=False))


def ours(source: ModelSource) -> Tensor:
    model = load_model(source)
    for layer in source.anatomy.linears:
        if (grid := source.grid(layer)) is not None:
            model.get_submodule(layer).register_forward_pre_hook(rounding(grid))
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schemes", "tolerance"),
    [
        ({"proj": "w8a8"}, ROUNDED_INPUTS),
        ({"proj": "w8a16", "lm_head": "w8a16"}, WEIGHTS_ONLY),
        ({"q_proj": "w4a16-g32", "down_proj": "w8a16", "up_proj": "w4a16-g32-asym"}, WEIGHTS_ONLY),
    ],
)
def test_plain_transformers_computes_what_we_mean(
    dense: ModelSource, schemes: dict[str, str], tolerance: float, tmp_path: Path
) -> None:
    stage = on_grids(dense, tmp_path / "stage", schemes)
    # compressed-tensors holds no mixture that has zero points; torchao does.
    is_mixed = "w4a16-g32-asym" in schemes.values()
    source = stage if is_mixed else packed(stage, tmp_path / "packed", "mixed")
    said = ck.export(source.directory, to="torchao", out=tmp_path / "out")
    assert bool(said) == is_mixed
    weights, logits = as_users_see_it(tmp_path / "out")
    assert len(weights) == 15
    for layer, weight in weights.items():
        assert torch.equal(weight, stage.weight_OI(layer)), layer
    print(schemes, "largest logit difference:", float((logits - ours(stage)).abs().max()))
    assert (logits - ours(stage)).abs().max() <= tolerance
    if not is_mixed:
        size = (tmp_path / "out" / "model.safetensors").stat().st_size
        assert size < 0.65 * (stage.directory / "model.safetensors").stat().st_size


def test_what_no_tensor_class_holds_is_told_by_layer(dense: ModelSource, tmp_path: Path) -> None:
    for scheme, message in (
        ("fp8", "expected integers, got fp8 in model.layers.0.self_attn.q_proj"),
        ("nf4", "expected integers, got nf4 in"),
        ("w8a8-static", "expected inputs rounded per token, got w8a8-static in"),
        ("w4a8-g32", "weights of 4 bits with inputs that are not rounded, got w4a8-g32 in"),
    ):
        stage = on_grids(dense, tmp_path / scheme, {"proj": scheme})
        with pytest.raises(FormatError, match=message):
            ck.export(stage.directory, to="torchao", out=tmp_path / "out")
    with pytest.raises(FormatError, match="expected quantised layers, got none"):
        ck.export(dense.directory, to="torchao", out=tmp_path / "out")
