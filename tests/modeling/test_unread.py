"""A packed layer's weight is made dense when its numbers are asked for, and not for its type or place."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import compresskit as ck
from compresskit.kernels.bitmap import pack, unpack
from compresskit.kernels.choice import Wish
from compresskit.modeling import sparse_linear
from compresskit.modeling.sparse_linear import SparseLinear, sparse_layers
from compresskit.modeling.unread import Unread
from tests.tiny import byte_tokenizer

DENSE = torch.arange(12.0).view(3, 4)


def unread(made: list[int] | None = None) -> Unread:
    """Of :data:`DENSE`; ``made`` counts."""

    def make() -> Tensor:
        if made is not None:
            made.append(1)
        return DENSE.clone()

    return Unread(make, (3, 4), torch.float32, torch.device("cpu"))


def test_what_is_told_without_numbers() -> None:
    made: list[int] = []
    found = unread(made)
    assert isinstance(found, Tensor)
    assert (found.dtype, found.device, found.shape) == (torch.float32, torch.device("cpu"), (3, 4))
    assert (found.dim(), found.ndim, found.numel(), found.size(1), len(found)) == (2, 2, 12, 4, 3)
    assert (found.nbytes, found.itemsize, found.element_size()) == (48, 4, 4)
    assert found.is_floating_point()
    assert torch.is_floating_point(found)
    assert found.is_cpu
    assert (found.is_cuda, found.is_meta, found.requires_grad, found.grad) == (False, False, False, None)
    assert made == []


READS: dict[str, Callable[[Tensor], Any]] = {
    "equal": lambda w: torch.equal(w, DENSE),
    "operator": lambda w: (w + w).sum() == 2 * DENSE.sum(),
    "product": lambda w: torch.equal(linear(torch.eye(4), w), DENSE.T),
    "out of many": lambda w: torch.equal(torch.cat([w, w]), DENSE.repeat(2, 1)),
    "element": lambda w: w[2, 3].item() == 11,
    "list": lambda w: w.tolist() == DENSE.tolist(),
    "rows": lambda w: [row.sum().item() for row in w] == DENSE.sum(1).tolist(),
    "numpy": lambda w: (w.numpy() == DENSE.numpy()).all(),
    "data": lambda w: torch.equal(w.data, DENSE),
    "moved": lambda w: torch.equal(w.to(torch.bfloat16), DENSE.bfloat16()),
    "text": lambda w: "11." in repr(w),
    "copy": lambda w: torch.equal(copy.deepcopy(w), DENSE),
    "pickle": lambda w: torch.equal(pickle.loads(pickle.dumps(w)), DENSE),
    "file": lambda w: torch.equal(load(save({"w": w}))["w"], DENSE),
    "operator of a library": lambda w: torch.equal(torch.ops.aten.neg.default(w), -DENSE),
    "strides": lambda w: w.is_contiguous() and w.stride() == (4, 1) and w.data_ptr() == w.data_ptr(),
    "gradient of another": lambda w: (
        (x := torch.ones(4, requires_grad=True), linear(x, w).sum().backward())
        and torch.equal(x.grad, DENSE.sum(0))
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", READS)
def test_its_numbers_are_those_of_the_tensor(name: str) -> None:
    made: list[int] = []
    found = unread(made)
    assert READS[name](found)
    assert READS[name](found)
    assert made == [1], "made once"
    assert type(found * 1) is Tensor


def test_what_was_made_goes_with_it() -> None:
    found = unread()
    gone = weakref.ref(found.read())
    del found
    assert gone() is None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that a layer's dense weight is made."""
    made: list[str] = []
    real = SparseLinear._unpacking

    def counting(layer: SparseLinear) -> Callable[[], Tensor]:
        make = real(layer)

        def counted() -> Tensor:
            made.append(layer.extra_repr())
            return make()

        return counted

    monkeypatch.setattr(sparse_linear.SparseLinear, "_unpacking", counting)
    return made


@pytest.mark.parametrize("wish", [None, Wish(layout="bitmap")])
def test_a_weight_that_is_held_stays_what_it_was(wish: Wish | None) -> None:
    plain = torch.arange(12.0).view(3, 4)
    layer = SparseLinear.of(pack(plain))
    if wish is not None:
        layer.settle(wish)
    held = layer.weight
    layer.half()
    assert (held.dtype, layer.weight.dtype) == (torch.float32, torch.float16)
    assert torch.equal(held + 0, plain)


@pytest.mark.parametrize("wish", [None, Wish(layout="bitmap"), Wish(layout="dense")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_layers_weight_is_made_when_it_is_read(
    wish: Wish | None, kind: torch.dtype, counted: list[str]
) -> None:
    keep = torch.rand(5, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    plain = (keep * torch.arange(1.0, 71)).to(kind)
    packed = pack(plain, torch.full((5, 2), 0.5) if kind == torch.int8 else None)
    dtype = torch.bfloat16 if kind == torch.int8 else kind
    layer = SparseLinear.of(packed, dtype=dtype)
    if wish is not None:
        layer.settle(wish)
    weight = layer.weight
    assert (weight.dtype, weight.device.type, weight.shape) == (dtype, "cpu", (5, 70))
    assert counted == []
    assert torch.equal(weight, unpack(packed, dtype))
    assert len(counted) == (0 if wish is not None and wish.layout == "dense" else 1)
    assert not torch.equal(weight, torch.zeros(5, 70, dtype=dtype))
    assert len(counted) <= 1


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` with zeros in its feed-forward layers, and ``packed``."""
    place = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=258,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=257,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if parameter.dim() == 2 else None
            if "DenseReluDense" in name:
                parameter.mul_(torch.rand(parameter.shape) < 0.4)
    model.save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    ck.export(place / "model", to="bitmask", out=place / "packed")
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_t5_is_decoded_without_unpacking(
    dtype: torch.dtype, t5: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call asks for the type of ``wo`` twice or more; beside float16 ``wo`` is float32."""
    monkeypatch.setenv("COMPRESSKIT_LAYOUT", "bitmap")
    packed = AutoModelForSeq2SeqLM.from_pretrained(t5 / "packed", dtype=dtype)
    dense = AutoModelForSeq2SeqLM.from_pretrained(t5 / "model", dtype=dtype)
    layers = sparse_layers(packed)
    assert len(layers) == 12
    assert {found.dtype for name, found in layers.items() if name.endswith(".wo")} == {torch.float32}
    assert {found.dtype for name, found in layers.items() if not name.endswith(".wo")} == {dtype}
    asked: list[str] = []
    real = SparseLinear.weight.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        SparseLinear, "weight", property(lambda layer: (asked.append("weight"), real(layer))[1])
    )
    x = torch.arange(1, 12)[None]
    made = [m.generate(x, max_new_tokens=10, min_new_tokens=10, do_sample=False) for m in (packed, dense)]
    assert torch.equal(*made)
    assert made[0].unique().numel() > 2
    assert len(asked) >= 2 * 2 * 11, "of two encoder blocks once, of two decoder blocks for each token"
    assert counted == []
