"""Small models of many families with random weights, and the verbs of a cut on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from compresskit.data.spec import DataSpec
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured import IMPORTANCES
from compresskit.sparse.structured.base import Subject
from compresskit.sparse.structured.cut import Cut
from compresskit.sparse.structured.outline import Outline
from compresskit.sparse.structured.surgery import Kept, Patient, Surgery, choose
from compresskit.stage import Outlook, Promise, StageContext, StageResult

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
TIED = {**GROUPED, "tie_word_embeddings": True}
GATED = ("mlp.gate_proj", "mlp.up_proj")
DECODER = ("model.embed_tokens", "self_attn.o_proj", "mlp.down_proj")
OPT_WRITERS = ("decoder.embed_tokens", "decoder.embed_positions", "self_attn.out_proj", "fc2")
GPT2_WRITERS = ("wte", "wpe", "attn.c_proj", "mlp.c_proj")
BERT_WRITERS = (
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "output.dense",
    "pooler.dense",
)

# Class: configuration, what reads neurons, what makes them, what reads heads, what writes hidden channels.
FAMILIES: dict[str, tuple[dict[str, Any], str, tuple[str, ...], str, tuple[str, ...]]] = {
    "LlamaForCausalLM": (GROUPED, "mlp.down_proj", GATED, "self_attn.o_proj", DECODER),
    "Qwen2ForCausalLM": (
        {**SMALL, "num_key_value_heads": 2, "intermediate_size": 32},
        "mlp.down_proj",
        GATED,
        "self_attn.o_proj",
        DECODER,
    ),
    "Qwen3ForCausalLM": (TIED, "mlp.down_proj", GATED, "self_attn.o_proj", DECODER),
    "MistralForCausalLM": (GROUPED, "mlp.down_proj", GATED, "self_attn.o_proj", DECODER),
    "Gemma2ForCausalLM": (GROUPED, "mlp.down_proj", GATED, "self_attn.o_proj", DECODER),
    "Gemma3ForCausalLM": (GROUPED, "mlp.down_proj", GATED, "self_attn.o_proj", DECODER),
    "Phi3ForCausalLM": (
        {**GROUPED, "head_dim": 8},
        "mlp.down_proj",
        ("mlp.gate_up_proj",),
        "self_attn.o_proj",
        DECODER,
    ),
    "GPT2LMHeadModel": (SMALL, "mlp.c_proj", ("mlp.c_fc",), "attn.c_proj", GPT2_WRITERS),
    "OPTForCausalLM": (
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "fc2",
        ("fc1",),
        "self_attn.out_proj",
        OPT_WRITERS,
    ),
    "BertForSequenceClassification": (
        SMALL,
        "output.dense",
        ("intermediate.dense",),
        "attention.output.dense",
        BERT_WRITERS,
    ),
    "BertForMaskedLM": (
        SMALL,
        "output.dense",
        ("intermediate.dense",),
        "attention.output.dense",
        (*BERT_WRITERS, "transform.dense"),
    ),
    "GPTNeoXForCausalLM": (
        SMALL,
        "mlp.dense_4h_to_h",
        ("mlp.dense_h_to_4h",),
        "attention.dense",
        ("embed_in", "attention.dense", "mlp.dense_4h_to_h"),
    ),
}
FOLLOWING = ("GPT2", "OPT", "Bert", "GPTNeoX")
"""Families whose heads together are as wide as the hidden size, whatever the configuration."""


def follows(name: str) -> bool:
    return name.startswith(FOLLOWING)


def build(name: str, directory: Path, **changes: Any) -> ModelSource:
    """A model whose parameters are all random: biases start at zero, which would hide a wrong cut of one."""
    cls: Any = getattr(transformers, name)
    settings = {**FAMILIES[name][0], **changes}
    if name in ("OPTForCausalLM", "GPT2LMHeadModel"):
        settings.pop("intermediate_size", None)
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.02 if parameter.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(directory)
    return open_model(directory)


def outlook(model: ModelSource) -> Outlook:
    return Outlook(
        anatomy=model.anatomy,
        config=model.config,
        tokenizer=model.directory,
        original=model.directory,
        weight_bytes=4.0,
    )


def run(cut: Prune, model: ModelSource, place: Path, *promises: Promise) -> tuple[StageResult, ModelSource]:
    (place / "out").mkdir(parents=True)
    context = StageContext(
        out=place / "out",
        scratch=place,
        original=model.directory,
        data=DataSpec(source="no-such-data"),
        cache=place,
        promises=promises,
        device="cpu",
    )
    return cut.run(model, context), open_model(place / "out")


def planned(model: ModelSource, **options: Any) -> Surgery:
    patient = Patient(model.config, model.anatomy, model.directory)
    return Outline(Cut(**options), patient).surgery()


def kept_by(model: ModelSource, rows: Any = None, **options: Any) -> Kept:
    """What a cut with ``options`` leaves of ``model``."""
    surgery = planned(model, **options)
    subject = Subject(model=model, dimensions=surgery.dimensions, rows=rows)
    importance = IMPORTANCES[options.get("importance", "magnitude")]()
    return choose(surgery, importance.measure(subject), len(model.anatomy.blocks))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 23).view(2, -1)).logits
    return found


def switch_off_inputs(whole: nn.Module, model: ModelSource, reader: str, keep_LN: torch.Tensor) -> None:
    """Let ``reader`` of each block read nothing where ``keep_LN`` (blocks, inputs) is False."""
    for block, keep_N in zip(model.anatomy.blocks, keep_LN, strict=True):
        linear = model.anatomy.linears[f"{block}.{reader}"]
        weight: Any = whole.get_submodule(linear.name).weight
        with torch.no_grad():
            weight[~keep_N if linear.transposed else (slice(None), ~keep_N)] = 0


def switch_off_channels(
    whole: nn.Module, small: nn.Module, writers: tuple[str, ...], keep_D: torch.Tensor
) -> None:
    """Let nothing write channels where ``keep_D`` is False, and let norms be those of ``small``."""
    channels = keep_D.nonzero().flatten()
    for name, module in whole.named_modules():
        weight: Any = getattr(module, "weight", None)
        if weight is None:
            continue
        if name.endswith(writers):
            transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            with torch.no_grad():
                weight[(slice(None), ~keep_D) if transposed else ~keep_D] = 0
                if getattr(module, "bias", None) is not None:
                    module.bias[~keep_D] = 0  # type: ignore[operator, index]
            if hasattr(module, "embed_scale"):
                module.embed_scale = small.get_submodule(name).embed_scale
        elif weight.dim() == 1 and len(weight) == len(keep_D):
            norm = small.get_submodule(name)

            def forward(hidden: torch.Tensor, norm: nn.Module = norm) -> torch.Tensor:
                return torch.zeros_like(hidden).index_copy(-1, channels, norm(hidden[..., channels]))

            module.forward = forward  # type: ignore[method-assign]


def loaded(model: ModelSource) -> nn.Module:
    return load_model(model)
