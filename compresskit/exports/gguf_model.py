"""What GGUF says of a model besides its tokens: architecture, hyperparameters, the order of rotary rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compresskit.errors import Fault
from compresskit.modeling import context_length

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp computes a model.

    Attributes:
        name: what it is called in the file.
        activation: the one ``hidden_act`` that it computes.
        permuted: rotary pairs are neighbouring rows, where transformers has them half a head apart.
        norm_shift: added to norm weights, which transformers stores less one for some models.
    """

    name: str
    activation: str = "silu"
    permuted: bool = False
    norm_shift: float = 0.0


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", permuted=True),
    "MistralForCausalLM": Architecture("llama", permuted=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", activation="gelu_pytorch_tanh", norm_shift=1.0),
}
ROPES = ("default", "linear", "llama3")


def config_faults(config: Any, where: str) -> list[Fault]:
    """What llama.cpp would not compute as ``config`` says."""
    names = getattr(config, "architectures", None) or ["none"]
    if names[0] not in ARCHITECTURES:
        cure = (
            "Export to compressed-tensors or dense, or convert the dense model with llama.cpp's own script."
        )
        return [Fault(where, f"one of {', '.join(ARCHITECTURES)}", names[0], cure)]
    architecture = ARCHITECTURES[names[0]]
    faults = []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        cure = "llama.cpp computes no other: export to dense."
        faults.append(Fault(where, f"hidden_act {architecture.activation}", str(activation), cure))
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ROPES:
        cure = "Export to dense, and convert that with llama.cpp's own script."
        faults.append(Fault(where, f"rope_type {', '.join(ROPES)}", str(kind), cure))
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window and used and window < context_length(config):
        cure = f"Set max_position_embeddings to {window} in config.json; llama.cpp attends to everything."
        faults.append(Fault(where, "attention without a sliding window", f"a window of {window}", cure))
    return faults


def rope_of(config: Any) -> Mapping[str, Any]:
    """The rotary embedding's parameters."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found


def head_dim(config: Any) -> int:
    """Features of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> Tensor | None:
    """By how much each rotary frequency is divided, for ``llama3`` scaling; None where none is."""
    if rope_of(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_dim(config)
    plain = 1.0 / float(rope_of(config)["rope_theta"]) ** (torch.arange(0, dim, 2).float() / dim)
    return (plain / scaled).float()


def row_order(parameter: str, config: Any) -> Tensor | None:
    """Which row of a query's or key's projection comes where; None for other parameters."""
    layer = parameter.rpartition(".")[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(layer.rpartition(".")[2])
    if count is None:
        return None
    rows = torch.arange(count * head_dim(config))
    return rows.reshape(count, 2, -1).transpose(1, 2).reshape(-1)


def write_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Everything llama.cpp needs to build the graph."""
    import gguf

    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
