"""Run an objective inside a model's own forward, so that every engine's hooks see it.

Outside of the wrapped forward the output projection may be a shard (FSDP2) or empty (ZeRO-3). So the model's
forward is replaced by one that stops at the hidden states, and the head is still *called*: only what it
computes is replaced, for the length of the call. Engines gather its weight as for any other layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from compresskit.modeling.forwards import computing, keeping
from compresskit.training.features import Featured, compared_blocks, with_feature_loss
from compresskit.training.objective import (
    Head,
    Objective,
    Signal,
    head_module,
    softcap_of,
)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def redirected(model: nn.Module, objective: Objective, *, precision: str) -> Iterator[None]:
    """While this lasts, ``model(input_ids, position_ids, labels, signal)`` is the objective's sums.

    Args:
        model: a causal language model, not wrapped yet.
        objective: what to compute.
        precision: ``fp32``, ``bf16`` or ``fp16``: the type matrix products run in; weights are not touched.
    """
    head = head_module(model)
    softcap = softcap_of(model)
    featured = objective if isinstance(objective, Featured) else None
    # Found now: an engine may leave parameters empty, by whose number blocks are known.
    blocks = compared_blocks(model, featured.blocks) if featured else ()

    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        signal: Signal | None = None,
    ) -> Mapping[str, Tensor]:
        def project(hidden: Tensor) -> Mapping[str, Tensor]:
            bias, weight = getattr(head, "bias", None), cast(Tensor, head.weight)
            operands = getattr(head, "operands", None)
            if callable(operands):  # a layer that multiplies something else than it holds
                hidden, weight = operands(hidden)
            return objective(_narrow(hidden, precision), Head(weight, bias, softcap), labels, signal)

        kind = input_ids.device.type
        with torch.autocast(kind, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            base: nn.Module = model.base_model  # type: ignore[assignment]
            with keeping(blocks) as kept:
                hidden = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
            with computing([(head, project)]):
                sums: Mapping[str, Tensor] = head(hidden)
            if featured is not None and signal is not None:
                states = [kept[block] for block in blocks]
                sums = with_feature_loss(featured, sums, model, states, signal.blocks_BTE, labels)
        return sums

    with computing([(model, forward)]):
        yield


def _narrow(hidden: Tensor, precision: str) -> Tensor:
    """The fused losses are no autocast ops: give them the type autocast would."""
    return hidden.to(AUTOCAST[precision]) if precision in AUTOCAST else hidden
