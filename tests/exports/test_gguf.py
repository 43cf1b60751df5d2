"""GGUF against the gguf package's own reader, and against llama.cpp itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import compresskit as ck
from compresskit.errors import FormatError
from compresskit.exports.gguf_vocab import read_vocabulary, vocabulary_faults
from compresskit.formats.grid import Grid
from compresskit.modeling import ModelSource, load_model, load_tokenizer, open_model
from tests.exports.models import on_grids, packed
from tests.tiny import byte_tokenizer, tiny_llama

TEACHER = Path(ck.__file__).parent / "assets" / "teacher"
HALF_STEP = 2.0**-11  # what rounding to float16 changes, at most, of a number that is not tiny
DENSE_TOLERANCE = 0.002  # of the largest logit: llama.cpp multiplies float16 by float16
ROUNDED_TOLERANCE = 0.02  # of it: inputs of quantised layers are rounded, each layer's errors move the next's
TEXT = "Once upon a time, there was a little girl named Lily. She liked to play with her dog.\nThey ran."

gguf = pytest.importorskip("gguf")


def tensors_in(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Kinds and values of what stands in a file, by name."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    kinds = {name: t.tensor_type.name for name, t in found.items()}
    values = {name: gguf.dequantize(t.data, t.tensor_type) for name, t in found.items()}
    return kinds, {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def rotary(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp wants them, one by one: within a head, pair i of both halves side by side."""
    half = weight_OI.shape[0] // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight_OI[order]


def allowed(grid: Grid, weight_OI: Tensor) -> Tensor:
    """How far a value may be off where only its scale (and minimum) was rounded to float16."""
    scale_OI = grid.scale_OG.float().repeat_interleave(weight_OI.shape[1] // grid.scale_OG.shape[1], 1)
    steps_OI = grid.quantize(weight_OI).float().abs()
    if grid.zero_point_OG is not None:
        steps_OI = torch.full_like(steps_OI, 15 + 15)
    own = torch.finfo(weight_OI.dtype).eps * weight_OI.float().abs()  # our value is rounded to its dtype
    return steps_OI * scale_OI * HALF_STEP + own


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(tiny_llama(tmp_path_factory.mktemp("gguf") / "model", hidden_size=64))


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w8a8", "Q8_0"),
        ("w8a8-static", "Q8_0"),
        ("w8a16", "Q8_0"),
        ("w4a16-g32", "Q4_0"),
        ("w4a16-channel", "Q4_0"),
        ("w4a16-g32-asym", "Q4_1"),
    ],
)
def test_integers_stay_and_only_scales_are_rounded(
    dense: ModelSource, scheme: str, kind: str, tmp_path: Path
) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": scheme})
    source = packed(stage, tmp_path / "packed", scheme)
    said = " ".join(ck.export(source.directory, to="gguf", out=tmp_path / "out"))
    assert "Scales are rounded to float16; the largest relative change" in said
    assert ("no longer exactly zero" in said) == ("asym" in scheme)
    assert (f"not as the scheme of 14 layers says ({scheme})." in said) == scheme.startswith("w8a8")
    assert "per token" not in said
    kinds, values = tensors_in(tmp_path / "out" / "model.gguf")
    assert len(kinds) == len(stage.names())
    for block in range(2):
        for theirs, ours, heads in (
            ("attn_q", "self_attn.q_proj", 4),
            ("attn_k", "self_attn.k_proj", 2),
            ("attn_v", "self_attn.v_proj", 0),
            ("attn_output", "self_attn.o_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
        ):
            name, layer = f"blk.{block}.{theirs}.weight", f"model.layers.{block}.{ours}"
            weight, grid = stage.weight_OI(layer), stage.grid(layer)
            assert grid is not None
            limit = allowed(grid, weight)
            if heads:
                weight, limit = rotary(weight, heads), rotary(limit, heads)
            assert kinds[name] == kind
            assert bool(((values[name] - weight).abs() <= limit).all()), name
            if "asym" not in scheme:
                assert torch.equal(values[name] == 0, weight == 0)
    assert {kinds[f"blk.0.{n}_norm.weight"] for n in ("attn", "ffn")} == {"F32"}
    assert torch.equal(values["token_embd.weight"], stage.tensor("model.embed_tokens.weight").half().float())


def test_what_no_block_holds_is_told_by_layer(dense: ModelSource, tmp_path: Path) -> None:
    odd = open_model(tiny_llama(tmp_path / "odd", hidden_size=64, intermediate_size=172))
    stage = on_grids(odd, tmp_path / "stage", {"proj": "w8a8"})
    with pytest.raises(
        FormatError, match=r"divisible by 32.*w8a8 in .*0.mlp.down_proj, model.layers.1.mlp.down_proj"
    ):
        ck.export(stage.directory, to="gguf", out=tmp_path / "out")
    for scheme, message in (
        ("fp8", "integers of 8 bits .symmetric. or 4 bits .* got fp8 in model.layers.0.self_attn.q_proj"),
        ("nf4", "got nf4 in"),
        ("w4a16-g16", "expected groups of a multiple of 32, got w4a16-g16 in"),
    ):
        stage = on_grids(dense, tmp_path / scheme, {"proj": scheme})
        with pytest.raises(FormatError, match=message):
            ck.export(stage.directory, to="gguf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_does_not_compute_is_told(dense: ModelSource, tmp_path: Path) -> None:
    path = dense.directory / "config.json"
    text = path.read_text()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, "got GPTNeoXForCausalLM"),
        ({"hidden_act": "relu"}, "expected hidden_act silu, got relu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "expected rope_type default, linear, llama3, got dynamic",
        ),
    ]
    from compresskit.exports.gguf_model import config_faults
    from compresskit.modeling.skeleton import load_config

    for change, message in changes:
        (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | change))
        (fault,) = config_faults(load_config(tmp_path), "here")
        assert message in str(fault)


def test_tokenizers_that_llama_cpp_splits_otherwise_are_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert vocabulary_faults(tmp_path, "here") == []
    found = read_vocabulary(tmp_path, "here")
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    changes: list[tuple[str, dict[str, Any], str]] = [
        ("model", plain["model"] | {"type": "WordPiece"}, "got a WordPiece tokenizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "got a tokenizer of"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [split, plain["pre_tokenizer"] | {"use_regex": False}]},
            r"byte-level tokenizer that splits by \d",
        ),
    ]
    for key, value, message in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(plain | {key: value}))
        (fault,) = vocabulary_faults(tmp_path, "here")
        assert message in str(fault)
    (tmp_path / "tokenizer.json").unlink()
    assert "AutoTokenizer.from_pretrained" in str(vocabulary_faults(tmp_path, "here")[0])


def round_blocks(x: Tensor) -> Tensor:
    """Inputs as llama.cpp rounds them before it multiplies: 8 bits, one float16 scale for 32 of them."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    q = (blocks / scale.where(scale != 0, 1)).round()
    return (q * scale.half().float()).flatten(-2)


def as_llama_cpp_means_it(source: ModelSource, ids: list[int], *, rounded: bool) -> Tensor:
    model = load_model(source, dtype=torch.float32)
    for layer in source.anatomy.linears:
        if rounded and source.grid(layer) is not None:
            hook: Callable[..., Any] = lambda _, args: (round_blocks(args[0]),)  # noqa: E731
            model.get_submodule(layer).register_forward_pre_hook(hook)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


class LlamaCpp:
    """llama.cpp with its file; attention in float32, so that what differs are the weights' kinds."""

    def __init__(self, path: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (builds llama.cpp)")
        self._model = llama_cpp.Llama(
            str(path), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
        )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self._model.tokenize(text.encode(), add_bos=True, special=False)
        return found

    def logits(self, ids: list[int]) -> Tensor:
        self._model.reset()
        self._model.eval(ids)
        return torch.from_numpy(np.array(self._model.scores[: len(ids)]))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "w8a16", "w4a16-g32", "w4a16-g64-asym"])
@pytest.mark.parametrize("name", ["teacher", "stories260K", "TinyStories-656K"])
def test_llama_cpp_computes_what_we_mean(name: str, scheme: str | None, request: Any, tmp_path: Path) -> None:
    place = TEACHER if name == "teacher" else request.getfixturevalue("shared_data") / "models" / name
    source = open_model(place)
    if scheme:
        # Of stories260K, down_proj has 172 inputs, which no block fits.
        tails = ("_proj",) if name != "stories260K" else ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")
        source = on_grids(source, tmp_path / "stage", dict.fromkeys(tails, scheme))
    ck.export(source.directory, to="gguf", out=tmp_path / "out")
    ids = load_tokenizer(source)(TEXT).input_ids
    with LlamaCpp(tmp_path / "out" / "model.gguf") as theirs:
        assert theirs.tokens(TEXT) == ids
        got = theirs.logits(ids)
    want = as_llama_cpp_means_it(source, ids, rounded=False)
    difference = float((got - want).abs().max() / want.abs().max())
    print(name, scheme, "largest logit difference, of the largest logit:", difference)
    assert difference <= (ROUNDED_TOLERANCE if scheme else DENSE_TOLERANCE)
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() >= 0.95


@pytest.mark.slow
def test_what_differs_is_how_llama_cpp_rounds_inputs(tmp_path: Path) -> None:
    source = on_grids(open_model(TEACHER), tmp_path / "stage", {"layers.0.mlp.down_proj": "w8a16"})
    ck.export(source.directory, to="gguf", out=tmp_path / "out")
    ids = load_tokenizer(source)(TEXT).input_ids
    with LlamaCpp(tmp_path / "out" / "model.gguf") as theirs:
        got = theirs.logits(ids)
    plain = (got - as_llama_cpp_means_it(source, ids, rounded=False)).square().mean().sqrt()
    rounded = (got - as_llama_cpp_means_it(source, ids, rounded=True)).square().mean().sqrt()
    assert rounded < 0.5 * plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Gemma", {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"}),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ],
)
def test_other_architectures(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    torch.manual_seed(0)
    cls = getattr(transformers, f"{family}ForCausalLM")
    model = cls(cls.config_class(**settings | config))
    with torch.no_grad():  # so that norms, biases and positions matter
        for name, parameter in model.named_parameters():
            parameter += (0.3 if "norm" in name or "bias" in name else 0.1) * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    ck.export(source.directory, to="gguf", out=tmp_path / "out")
    ids = [256, *range(1, 100, 2)]
    with LlamaCpp(tmp_path / "out" / "model.gguf") as theirs:
        got = theirs.logits(ids)
    want = as_llama_cpp_means_it(source, ids, rounded=False)
    print(family, config, "max abs", float((got - want).abs().max()), "of", float(want.abs().max()))
    assert (got - want).abs().max() <= 0.005 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "stories260K", "TinyStories-656K"])
def test_llama_cpp_splits_text_as_our_tokenizer_does(name: str, request: Any, tmp_path: Path) -> None:
    data = request.getfixturevalue("shared_data")
    source = open_model(TEACHER if name == "teacher" else data / "models" / name)
    ck.export(source.directory, to="gguf", out=tmp_path / "out")
    tokenizer = load_tokenizer(source)
    lines = (data / "tinystories" / "valid_head_clean.jsonl").read_text().splitlines()[:100]
    texts = [json.loads(line)["text"] for line in lines]
    if name != "TinyStories-656K":  # whose vocabulary has neither bytes nor most characters
        texts += ["x = {'a': 1}\n\n\tif  x:\n", "caf\u00e9 \u4f60\u597d \U0001f642", " lead and trail ", ""]
        texts.append("it's WE'LL 12345 6,789.01 ==>  ...")
    with LlamaCpp(tmp_path / "out" / "model.gguf") as theirs:
        for text in texts:
            ids = tokenizer(text).input_ids
            if tokenizer.unk_token_id not in ids:
                assert theirs.tokens(text) == ids, text
