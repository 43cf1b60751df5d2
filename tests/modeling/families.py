"""One tiny model of each family, with random weights, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

VOCAB = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = COMMON | {"num_key_value_heads": 2}
GEMMA = GQA | {"head_dim": 4, "sliding_window": 6}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 8}
QWEN2 = GQA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**QWEN2)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA, head_dim=4, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GQA, sliding_window=6)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA, layer_types=GEMMA3_LAYERS)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2-bare": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**COMMON)),
}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CAUSAL = [name for name in FAMILIES if name != "bert"]


def make(family: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of ``family``; no weight is zero, one or equal to another."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(dtype)
    model.save_pretrained(directory)
    if family == "gpt2-bare":  # as on the hub: no "transformer." and a mask that is no longer stored
        state = {
            k.removeprefix("transformer."): v for k, v in model.state_dict().items() if "lm_head" not in k
        }
        state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        save_file({k: v.contiguous() for k, v in state.items()}, directory / "model.safetensors")
    return directory


def tokens(length: int, seed: int) -> torch.Tensor:
    """Random token ids (length,) without the special ones."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
