"""Prefix tuning on packed rows: trained keys and values that stand before every document of a row.

peft's own forward hands them to the model as a cache, with which transformers no longer tells the documents
of a packed row apart; so the mask that does is built here. Positions begin after the prefix, as in peft.

Paper: Li and Liang, "Prefix-Tuning", 2021, https://arxiv.org/abs/2101.00190.
Shapes: B = rows, T = tokens of a row, P = virtual tokens of the prefix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "prefix_encoder"
"""Name of the prefix's own module in the body of the model."""
SPREAD = 0.02
"""Standard deviation of a prefix before training: like token embeddings, not peft's 1."""


def add_prefix(tuned: Any) -> None:
    """Let the body of a prefix-tuned model see its prefix in every forward pass.

    Args:
        tuned: a ``PeftModelForCausalLM`` with a prefix; the model inside it is changed in place.
    """
    body = tuned.get_base_model().base_model
    encoder = tuned.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.mul_(SPREAD)
    kind = type(body)
    body.__class__ = type(f"Prefixed{kind.__name__}", (Prefixed, kind), {})
    setattr(body, PREFIX, encoder)
    # Not a module of the body: it holds the body itself.
    object.__setattr__(body, "tuned", tuned)


class Prefixed:
    """Comes before the class of a transformers body; see :func:`add_prefix`."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, **others: Any) -> Any:
        """The body's output for ``input_ids`` and ``position_ids``, each (B, T)."""
        body: Any = self
        tuned = body.tuned
        kind = input_ids.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        cache = tuned.get_prompt(input_ids.shape[0])
        for layer in cache.layers if narrow else ():
            layer.keys, layer.values = layer.keys.to(narrow), layer.values.to(narrow)
        virtual = tuned.active_peft_config.num_virtual_tokens
        keep = visible(position_ids, virtual)
        if body.config._attn_implementation != "sdpa":
            lowest = torch.finfo(narrow or torch.float32).min
            keep = torch.zeros(keep.shape, device=keep.device, dtype=narrow).masked_fill(~keep, lowest)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            position_ids=position_ids + virtual,
            attention_mask=keep,
            past_key_values=cache,
            **others,
        )


def visible(position_ids: Tensor, virtual: int) -> Tensor:
    """What each token of packed rows may attend to.

    Args:
        position_ids: int64 (B, T); a document begins wherever they do not go up by one.
        virtual: P.

    Returns:
        bool (B, 1, T, P + T): the whole prefix, and the document's own tokens up to this one.
    """
    jumps_BT = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    document_BT = jumps_BT.cumsum(-1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    keep_BTT = same_BTT & torch.ones_like(same_BTT[0]).tril()
    return nn.functional.pad(keep_BTT, (virtual, 0), value=True)[:, None]
