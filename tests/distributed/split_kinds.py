"""Models of several kinds, whole and then split among the ranks of a launch: one pass forward and backward.

Imported by the script of a rank; :func:`compare` is what it calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
)

from compresskit.training.mesh.split import split

VOCABULARY, PAD = 49, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}
KINDS: Mapping[str, PretrainedConfig] = {
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "scaled embedding": Gemma2Config(**SIZES, tie_word_embeddings=True),
    "gathered outputs": Phi3Config(**SIZES),
    "norms of all heads": Olmo2Config(**SIZES),
    "fused queries": GPTNeoXConfig(**SIZES),
    "tied, scaled logits": CohereConfig(**SIZES),
}


def compare(ways: int) -> dict[str, dict[str, float]]:
    """Of each kind how far the loss and the gradients (of the largest) are off, and a rank's share."""
    mesh = init_device_mesh("cpu", (ways,), mesh_dim_names=("tensor",))
    return {name: _compared(config, mesh) for name, config in KINDS.items()}


def _compared(config: PretrainedConfig, mesh: Any) -> dict[str, float]:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).float()
    numbers = sum(p.numel() for p in model.parameters())
    loss, gradients = _pass(model)
    model.zero_grad()
    split(model, mesh)
    again, others = _pass(model)
    assert gradients.keys() == others.keys()
    off = [(others[n] - g).abs().max() / g.abs().max().clamp_min(1e-6) for n, g in gradients.items()]
    share = sum(_part(p).numel() for p in model.parameters()) / numbers
    return {"loss": abs(float(loss - again)), "gradient": float(max(off)), "share": share}


def _pass(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a few tokens, padding among them, and the whole gradients."""
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    ids[0, 2] = ids[1, 5] = PAD
    parts: Any = model
    logits = parts.get_output_embeddings()(parts.base_model(input_ids=ids)[0])
    loss = cross_entropy(logits.view(-1, VOCABULARY), ids.view(-1).roll(-1))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {n: (g.full_tensor() if hasattr(g, "full_tensor") else g) for n, g in found.items()}


def _part(parameter: Tensor) -> Tensor:
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part
