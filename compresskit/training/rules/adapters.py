"""What does not combine: adapters on a frozen model. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule, adapter_of
from compresskit.training.setting import Setting


def _looks_inside(s: Setting) -> bool:
    return getattr(s.fields, "on_policy", None) is not None or getattr(s.fields, "features", None) is not None


RULES: tuple[Rule, ...] = (
    Rule(
        "few-sentences",
        "trainable",
        lambda s: s.fields.learns_sentences and getattr(s.fields, "trainable", "all") != "all",
        "all where rows are sentences: adapters and biases are looked for in models that generate text",
        "{trainable}",
        "Set trainable to all.",
    ),
    Rule(
        "prefix-learns",
        "trainable",
        lambda s: adapter_of(s.fields) == "prefix" and _looks_inside(s),
        "no prefix, which is a cache, beside on_policy or features",
        "{trainable}",
        "Set trainable to lora or bottleneck, or leave on_policy and features out.",
    ),
    Rule(
        "prefix-checkpointing",
        "activation_checkpointing",
        lambda s: adapter_of(s.fields) == "prefix" and s.fields.activation_checkpointing,
        "a prefix, which is a cache, without recomputed activations",
        "both",
        "Set activation_checkpointing to false, or use lora in place of the prefix.",
    ),
    Rule(
        "prefix-offload",
        "offload_activations",
        lambda s: (
            adapter_of(s.fields) == "prefix"
            and s.fields.offload_activations
            and not s.fields.activation_checkpointing
        ),
        "a prefix, which is a cache, with activations kept where they are",
        "both",
        "Set offload_activations to false, or use lora in place of the prefix.",
    ),
)
